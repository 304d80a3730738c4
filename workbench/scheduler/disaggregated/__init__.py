"""Schedulers of instances that prefill or decode alone, and what passes between the two of a pair."""
