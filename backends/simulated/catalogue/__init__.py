"""GPUs and models that can be modelled, by name."""
