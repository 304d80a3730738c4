"""Triton kernels. Each has a plain torch twin in ``backends/torch/ops/reference.py``."""
