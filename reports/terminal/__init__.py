"""Runs side by side in a terminal."""
