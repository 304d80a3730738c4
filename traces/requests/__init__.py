"""One request of a trace, and the tokens that it holds."""
