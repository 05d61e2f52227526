"""Kernels run in Triton's interpreter, which decides that when Triton is imported. Without PyTorch and Triton there is nothing to test."""

import os

os.environ["TRITON_INTERPRET"] = "1"

try:
    import torch
    import triton  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]  # a skip in this file would be an error
else:
    torch.set_num_threads(1)
