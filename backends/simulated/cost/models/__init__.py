"""Cost models: a batch to seconds, by a roofline, by measured operators or by fitted coefficients."""
