"""Azure LLM inference traces of 2023 and 2024: TIMESTAMP, ContextTokens, GeneratedTokens."""

from __future__ import annotations

from traces.formats.request_rows import csv_format

FORMAT = csv_format(
    "azure",
    "Azure LLM inference trace, CSV",
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    time_unit_is_sure=False,
    logged=True,
)
