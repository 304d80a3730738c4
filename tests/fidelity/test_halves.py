"""What is fitted to, and what is scored by."""

import hashlib

import pandas as pd

from benchmarks.board.halves import rows_score, scores, shape_scores


def test_a_half_is_the_last_digit_of_the_hash_of_the_joined_shape():
    for m, n, k in ((1, 4096, 4096), (8, 6144, 4096), (64, 1024, 512), (256, 8192, 28672)):
        digit = hashlib.sha256(f"gemm|{k}|{m}|{n}".encode()).hexdigest()[-1]
        assert shape_scores("gemm", {"m": m, "n": n, "k": k}) is scores(f"gemm|{k}|{m}|{n}") is (digit in "13579bdf")


def test_rows_of_one_shape_are_of_one_half_whatever_they_were_measured_with():
    sizes = {"m": [1, 8, 8], "n": [4096, 4096, 4096], "k": [4096, 512, 512]}
    table = pd.DataFrame({"gemm_dtype": ["fp8", "fp8", "bfloat16"], **sizes, "latency": [0.1, 0.2, 0.3]})
    halves = [shape_scores("gemm", {"m": m, "n": 4096, "k": k}) for m, k in ((1, 4096), (8, 512), (8, 512))]
    assert rows_score("gemm", table).tolist() == halves


def test_attention_of_a_table_without_windows_is_that_which_sees_every_token():
    table = pd.DataFrame({"num_heads": [32, 64], "num_key_value_heads": [8, 8], "head_dim": [128, 64]})
    whole = table.assign(window_size=0)
    kind = "generation_attention"
    assert rows_score(kind, table).tolist() == rows_score(kind, whole).tolist()
