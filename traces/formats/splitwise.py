"""splitwise-sim's traces: request_id, ..., arrival_timestamp (s), batch_size, prompt_size, token_size.

A row is one request: the simulator that the format belongs to reads `batch_size` and never uses it.
"""

from __future__ import annotations

from traces.formats.request_rows import csv_format

FORMAT = csv_format("splitwise", "splitwise-sim, CSV", ("arrival_timestamp", "prompt_size", "token_size"))
