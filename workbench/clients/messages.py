"""What becomes of a request of a trace on its way to a scheduler."""

from __future__ import annotations

END_OF_SEQUENCE = -2
"""Token id that ends a request where its trace says. No vocabulary has it, so content from a trace cannot end one early."""
