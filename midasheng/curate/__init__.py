"""Raw audio to captioned shards: where corpora are made, before anything is trained."""
