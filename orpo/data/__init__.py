"""Preference data: from a file or a data set to tokenized pairs."""
