"""Decisions of real engines, recorded, and whether this scheduler decides the same."""
