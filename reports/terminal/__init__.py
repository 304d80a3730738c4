"""Runs side by side in a terminal, and the same numbers as JSON."""
