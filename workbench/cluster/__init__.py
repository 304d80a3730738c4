"""Instances behind a router, on the simulated clock or in real time, and the run that they make."""
