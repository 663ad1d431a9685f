"""The fused loss: three stages in Triton and in torch, and the operators that drive them. See kernels/README.md."""
