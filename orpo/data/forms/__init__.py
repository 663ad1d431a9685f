"""What a row may look like, and the prompt and answers that it is read as."""
