"""The one error a caller of this package has to expect."""

from ground.errors import InputError


class RecordError(InputError):
    """A run record cannot be written, read or replaced. The message is one line, ready to be shown to the user."""
