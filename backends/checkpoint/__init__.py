"""The facts of a checkpoint's config.json, read once for the simulator and the real runner alike. Needs the standard library
only."""
