"""Vidur's processed traces: arrived_at, num_prefill_tokens, num_decode_tokens."""

from __future__ import annotations

from traces.formats.request_rows import csv_format

FORMAT = csv_format("vidur", "Vidur, CSV", ("arrived_at", "num_prefill_tokens", "num_decode_tokens"))
