"""Runs over time: CPU and GPU lanes, idle time and its causes, charts, single requests."""
