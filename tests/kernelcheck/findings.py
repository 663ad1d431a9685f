"""What the checkers raise."""


class MemoryFinding(Exception):
    """A race or an out-of-bounds access, in words: the kernel, the tensor and the programs."""
