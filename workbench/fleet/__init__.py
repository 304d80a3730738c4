"""Several instances and a router before them, started in one command."""
