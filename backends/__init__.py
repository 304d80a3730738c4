"""Backends that run batches: a modelled GPU (``simulated``) or a real one (``torch``)."""
