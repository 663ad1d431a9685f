"""The stages in Triton."""
