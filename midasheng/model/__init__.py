"""Pack -> loss: encoder, projector, decoder, what learns, and weights."""
