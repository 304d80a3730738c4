"""Runs for other tools: figures of a paper, Chrome trace events."""
