"""What becomes of text: prompts, special tokens, limits of length."""
