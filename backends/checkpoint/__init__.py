"""What a checkpoint's config.json says, read once for the simulator and the real runner alike. Needs the standard library
only."""
