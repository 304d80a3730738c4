"""The making of run records: rows of requests and iterations as they happen, and meta.json."""
