"""What a run leaves behind: rows of requests and iterations as they happen, and meta.json."""
