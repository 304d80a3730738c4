"""The modelled GPU: a SimPy world, cost models, and catalogues of hardware and models."""
