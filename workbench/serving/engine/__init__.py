"""The scheduler process: its scheduler, loop and backend, and the messages that other processes exchange with it."""
