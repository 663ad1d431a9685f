"""What a run leaves to read: a page, the model card and the curves."""
