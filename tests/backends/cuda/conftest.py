"""Kernels run in Triton's interpreter, which decides that when Triton is imported. Without PyTorch and Triton there is nothing to test.

QUIRE_TEST_DEVICE=cuda runs the engine's tests on a GPU instead: test_engine.py and test_deterministic.py.
"""

import os

if os.environ.get("QUIRE_TEST_DEVICE") != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import torch
    import triton  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]  # a skip in this file would be an error
else:
    torch.set_num_threads(1)
