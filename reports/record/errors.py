"""The one error a caller of this package has to expect."""


class RecordError(Exception):
    """A run record cannot be written, read or replaced. The message is one line, ready to be shown to the user."""
