"""Triton kernels, one module a concern: the ``@triton.jit`` functions, how each is configured and how it is launched.

``backends/torch/ops/triton.py`` checks arguments and calls them; nothing here falls back to another implementation.
"""
