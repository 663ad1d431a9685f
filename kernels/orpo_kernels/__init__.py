"""The fused loss: three stages as Triton kernels and in torch, and the operators that drive them. See kernels/README.md."""
