"""What is fitted to, and what is scored by."""

import hashlib

import pandas as pd

from benchmarks.board.halves import SHAPES, scores, scoring_rows, shape_scores


def test_a_half_is_the_last_digit_of_the_hash_of_the_joined_shape():
    for n, k in ((4096, 4096), (6144, 4096), (1024, 512), (8192, 28672)):
        digit = hashlib.sha256(f"gemm|{n}|{k}".encode()).hexdigest()[-1]
        assert shape_scores("gemm", n, k) is scores(f"gemm|{n}|{k}") is (digit in "13579bdf")


def test_all_rows_of_a_shape_are_of_one_half_whatever_else_differs():
    table = pd.DataFrame({"m": [1, 8, 64, 1], "n": [4096, 4096, 4096, 512], "k": [4096, 4096, 4096, 4096]})
    belongs = scoring_rows("gemm", table)
    assert belongs.tolist() == [shape_scores("gemm", 4096, 4096)] * 3 + [shape_scores("gemm", 512, 4096)]


def test_a_column_that_a_table_lacks_counts_as_0():
    table = pd.DataFrame({"num_heads": [32], "num_key_value_heads": [8], "head_dim": [128]})
    with_window = table.assign(window_size=0)
    kind = "generation_attention"
    assert SHAPES[kind][-1] == "window_size"
    assert scoring_rows(kind, table).tolist() == scoring_rows(kind, with_window).tolist()
