"""LLMServingSim 2: input_toks, output_toks, arrival_time_ns, input_tok_ids[], output_tok_ids[]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from traces.files.counted import counted
from traces.files.source import Source
from traces.files.values import MISSING, id_array, length, seconds
from traces.formats.base import Format, Head, Reading
from traces.requests.content import TokenIds, unique
from traces.requests.trace_request import TraceRequest


def _sniff(head: Head) -> bool:
    return head.has("input_toks", "output_toks")


def _read(reading: Reading) -> Iterator[TraceRequest]:
    def make(source: Source, line: int, record: dict[str, Any]) -> TraceRequest:
        input_length = length(source, line, "input_toks", record.get("input_toks", MISSING))
        output_length = length(source, line, "output_toks", record.get("output_toks", MISSING))
        arrival_ns = seconds(source, line, "arrival_time_ns", record.get("arrival_time_ns", MISSING))
        ids = {}
        for field, tokens in (("input_tok_ids", input_length), ("output_tok_ids", output_length)):
            if field in record:
                ids[field] = id_array(source, line, field, record[field], np.int32)
                if len(ids[field]) != tokens:
                    raise source.error(
                        line, field, f"has {counted(len(ids[field]), 'id')} where the length says {tokens}"
                    )
        request_id = f"r{line}"
        return TraceRequest(
            request_id=request_id,
            arrival_s=arrival_ns / 1e9,
            input_length=input_length,
            output_length=output_length,
            content=TokenIds(
                prompt=ids["input_tok_ids"],
                output=ids.get("output_tok_ids"),
                path=str(source.path),
                prompt_field=source.field("input_tok_ids"),
                output_field=source.field("output_tok_ids"),
            )
            if "input_tok_ids" in ids
            else unique(request_id),
            line=source.line(line),
        )

    return reading.json(make)


FORMAT = Format(
    name="llmservingsim",
    about="LLMServingSim, JSON lines with token ids",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
    needs=("input_toks", "output_toks", "arrival_time_ns"),
)
