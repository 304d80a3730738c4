"""A router of HTTP in front of servers: the simulator's choice of an instance, live."""
