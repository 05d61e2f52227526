"""The CPU backend: our own C++ kernels, no PyTorch."""
