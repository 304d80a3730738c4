"""The numbers of a run, and how each is named, written and judged."""
