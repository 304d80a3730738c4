"""Batches: two ways to choose one, and the assembly that both share."""
