"""What a run amounts to, in numbers, and how each is named, written and judged."""
