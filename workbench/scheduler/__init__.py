"""The scheduler: what runs next, where its KV lives, when it is done. Imports numpy and the standard library only."""
