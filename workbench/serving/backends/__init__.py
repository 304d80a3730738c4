"""What a server runs its model on: real hardware or a modelled one, made from what the command line says."""
