"""Names of the ways in which KV gets from one instance to another."""

from __future__ import annotations

from typing import Literal

CarrierName = Literal["auto", "tcp", "shm"]
"""``auto``: shared memory between instances of one machine and user, else TCP."""
