"""What runs a batch: a modelled GPU (``simulated``) or a real one (``torch``)."""
