"""Backends of a server: real hardware or a modelled one, made from what the command line says."""
