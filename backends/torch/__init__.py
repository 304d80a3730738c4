"""The real GPU backend: PyTorch, CUDA and Triton. Needs the extra ``live``; nothing imports it at module level."""
