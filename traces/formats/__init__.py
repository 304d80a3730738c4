"""The formats that can be read, in the order in which `--format auto` tries them."""

from __future__ import annotations

from traces.formats import (
    aibrix,
    azure,
    bailian,
    blis,
    burstgpt,
    length_table,
    llmservingsim,
    lmcache,
    mooncake,
    own,
    sharegpt,
    splitwise,
    vidur,
    weka,
)
from traces.formats.base import Format, Head, Reading

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        azure.FORMAT,
        burstgpt.FORMAT,
        vidur.FORMAT,
        splitwise.FORMAT,
        blis.FORMAT,
        llmservingsim.FORMAT,
        bailian.FORMAT,
        mooncake.FORMAT,
        weka.FORMAT,
        lmcache.TRACE_FORMAT,
        lmcache.TEXT_FORMAT,
        sharegpt.FORMAT,
        aibrix.FORMAT,
        length_table.FORMAT,  # Whatever has lengths under names of its own.
        own.FORMAT,  # Last: it asks the least of a record, so that a misspelt field gets an error that names it.
    )
}

__all__ = ["FORMATS", "Format", "Head", "Reading"]
