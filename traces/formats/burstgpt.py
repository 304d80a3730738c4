"""BurstGPT: Timestamp, Session ID, Elapsed time, Model, Request tokens, Response tokens, Total tokens, Log Type.

The sessions of later releases only group rows: every row keeps the arrival it was logged with.
"""

from __future__ import annotations

from traces.formats.request_rows import csv_format

FORMAT = csv_format(
    "burstgpt",
    "BurstGPT, CSV",
    ("Timestamp", "Request tokens", "Response tokens"),
    failed_without_output=True,
    logged=True,
)
