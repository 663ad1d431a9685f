"""This loss in the trainers of other projects, by one line each."""
