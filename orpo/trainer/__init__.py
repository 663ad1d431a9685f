"""The trainer: its settings, one step, evaluation, and what it refuses."""
