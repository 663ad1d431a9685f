"""What a run leaves to read: the report page, the model card and the curves."""
