"""What happened when: CPU and GPU lanes, idle time and its causes, charts over time, single requests."""
