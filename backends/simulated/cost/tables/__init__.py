"""Measured operator tables: their formats on disk, and how they are looked up."""
