"""Models on NVIDIA GPUs: PyTorch for memory and matrix products, Triton for paged attention and what lies between the products."""
