"""The verdict on runs in sentences, and what a reader has to know before believing it."""
