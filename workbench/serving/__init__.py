"""Live mode: an HTTP process with the tokenizer, a scheduler process with the backend, a detokenizer process."""
