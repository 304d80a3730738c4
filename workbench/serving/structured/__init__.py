"""What a client asks an output to look like, and the grammars made of it."""
