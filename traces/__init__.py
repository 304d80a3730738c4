"""Traces: requests read from files of many formats, reshaped, described and generated.

from traces import open_trace
for request in open_trace("mooncake_conversation.jsonl.gz"):
    request.arrival_s, request.prompt_tokens(vocab_size=128_256)
"""

from __future__ import annotations

from traces.files.errors import TraceError
from traces.formats import FORMATS
from traces.given import own_format, trace_of
from traces.requests.content import Content
from traces.requests.trace_request import TraceRequest
from traces.trace import Trace, TraceInfo, open_trace, sample_path

__all__ = [
    "FORMATS",
    "Content",
    "Trace",
    "TraceError",
    "TraceInfo",
    "TraceRequest",
    "open_trace",
    "own_format",
    "sample_path",
    "trace_of",
]
