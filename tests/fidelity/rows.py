"""Published rows, and files of them, that tests make up."""

from __future__ import annotations

from pathlib import Path

from benchmarks.board.silicon import APART, CONFIGURATION, Row


def row(**changes: object) -> Row:
    """A published row, but for what is given."""
    values: dict[str, object] = {
        "id": "one",
        "engine": "vllm",
        "version": "0.19.0",
        "model": "meta-llama/Llama-3.1-8B",
        "system": "h100_sxm",
        "mode": "agg",
        "precision": "",
        "input_tokens": 64,
        "output_tokens": 8,
        "concurrency": 4,
        "tp": 1,
        "dp": 1,
        "ep": 1,
        "shortest": 1.0,
        "ttft_s": 0.1,
        "tpot_s": 0.01,
        "configuration": "vllm|0.19.0",
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def written(path: Path, *rows: dict[str, str]) -> Path:
    """A file of published rows, each a default row but for the columns that are given."""
    columns = ["id", "silicon_data_source", "isl", "osl", "batch_size", "gemm_quant_mode", "precision"]
    columns += [*CONFIGURATION, *APART, "silicon_ttft_ms", "silicon_tpot_ms"]
    defaults = {
        "id": "a",
        "silicon_data_source": "source_file=x.csv; model=Llama-3.1-8B",
        "isl": "1024",
        "osl": "128",
        "batch_size": "16",
        "gemm_quant_mode": "fp8",
        "backend": "vllm",
        "backend_version": "0.12.0",
        "model_path": "meta-llama/Llama-3.1-8B",
        "system": "h100_sxm",
        "mode": "agg",
        "tp_size": "2",
        "pp_size": "1",
        "attention_dp_size": "",
        "moe_tp_size": "2",
        "moe_ep_size": "1",
        "silicon_ttft_ms": "100",
        "silicon_tpot_ms": "8",
    }
    lines = [",".join(columns)]
    lines += [",".join({**defaults, **one}.get(column, "") for column in columns) for one in rows]
    path.write_text("\n".join(lines) + "\n")
    return path
