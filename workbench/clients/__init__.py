"""Clients: a trace's requests at their times, sessions, closed loops, a load generator."""
