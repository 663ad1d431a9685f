"""The stages in torch, for a CPU."""
