"""The operations of a step in plain PyTorch, on any device: what `--device torch-cpu` runs, and what the kernels are tested against."""
