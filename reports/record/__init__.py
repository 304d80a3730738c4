"""The run record: its columns, how it is written and read, and where it may be written."""
