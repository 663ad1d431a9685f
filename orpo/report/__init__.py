"""What a run leaves to read: the model card and the curves."""
