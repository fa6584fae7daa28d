"""Loss, optimizer, Lightning module and the one `fit(stage)`; the curves."""
