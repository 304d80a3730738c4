"""The HTTP API: paths, bodies, status codes and events of an answer. Nothing below knows of them."""
