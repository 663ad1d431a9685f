"""A run on disk: checkpoints, the lock, the record, and what is whole."""
