"""Cost models: a batch to seconds."""
