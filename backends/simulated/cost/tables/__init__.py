"""Formats of what was measured: files on disk to the tables and coefficients of a cost model."""
