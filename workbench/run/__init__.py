"""Putting the pieces together for one run: settings, clients, router, instances, record. Used by the commands."""
