"""The scoreboard's parts: published measurements, the runs that predict them, and the tables of errors."""
