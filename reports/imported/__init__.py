"""Measured runs of other engines as run records: each tool's file read by a module of its own."""
