"""Which chunk clients of SGLang count as the first, from rows that belong to fitting."""

from __future__ import annotations

import pytest

from benchmarks import first_chunk
from benchmarks.board.launched import first_chunk_tokens
from benchmarks.board.predict import Predicted
from tests.fidelity.rows import row


def test_tokens_are_counted_from_the_first_one_in_the_tpot_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    published = row(
        engine="sglang", model="deepseek-ai/DeepSeek-R1", system="b200_sxm", shortest=0.8, ttft_s=0.37, tpot_s=0.01
    )
    # The prediction holds the chunk that is assumed; without it the first token comes after 0.2 s.
    assumed = first_chunk_tokens(published)
    monkeypatch.setattr(first_chunk, "predict", lambda row: Predicted(row, 0.2 + assumed * row.tpot_s, 0.012))
    assert first_chunk.tokens_later(published) == pytest.approx(17)
