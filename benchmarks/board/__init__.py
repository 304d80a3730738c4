"""What is compared with published measurements: whole runs and steps, with tables of errors, and fits to operators."""
