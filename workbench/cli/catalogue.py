"""``workbench catalogue``: the GPUs and models that are known by name."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from backends.simulated.catalogue.gpu_specs import GPU
    from backends.simulated.catalogue.model_specs import ModelSpec

WEIGHTS = ("auto", "bf16", "fp8", "int4")
WIDTH = 120
"""Columns of the tables where no terminal says how many it has."""


def catalogue(
    name: Annotated[
        Optional[str],
        typer.Argument(help="A GPU or model: all that is known of it. Default: a line for each.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the GPUs and models that `--gpu` and `--model` know by name, or show one with its sources."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        from backends.simulated.catalogue.gpu_specs import gpu_names, load_gpu, renamed_in_gpu
        from backends.simulated.catalogue.model_specs import load_model, model_names
        from ground.json_file import json_text
        from workbench.cli.runs import say

        if name is not None:
            say(renamed_in_gpu(name))
            found = _one(name)
            print(json_text(found)) if as_json else _print_one(found)
            return
        gpus = [_gpu_row(load_gpu(each)) for each in gpu_names()]
        models = [_model_row(load_model(each)) for each in model_names()]
        if as_json:
            print(json_text({"gpus": gpus, "models": models}))
        else:
            _print_all(gpus, models)


def _gpu_row(gpu: GPU) -> dict[str, Any]:
    return {
        "gpu": gpu.name,
        "memory_gib": round(gpu.memory_bytes / 2**30, 1),
        "bandwidth_tb_per_s": gpu.memory_bandwidth / 1e12,
        "bf16_tflops": gpu.bf16_flops / 1e12,
        "fp8_tflops": gpu.fp8_flops / 1e12,
        "link_gb_per_s": gpu.link_bandwidth / 1e9,
        "gpus_per_node": gpu.gpus_per_node,
        "pcie_link": gpu.pcie_link,
        "node_link_gb_per_s": gpu.node_link_bandwidth / 1e9,
    }


def _model_row(model: ModelSpec) -> dict[str, Any]:
    return {
        "model": model.name,
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "layers": model.layers,
        "kv_bytes_per_token": int(model.kv_bytes_per_token()),
        "max_context": model.max_context,
    }


def _one(name: str) -> dict[str, Any]:
    """Everything about one GPU or model. Raises CatalogueError, with the nearest names of both kinds."""
    import difflib
    from pathlib import Path

    from backends.simulated.catalogue.gpu_specs import CatalogueError, gpu_names, load_gpu
    from backends.simulated.catalogue.model_specs import load_model, model_names
    from reports.metrics.labels import weights_label

    if Path(name).suffix == ".toml" or name.lower() in gpu_names():
        facts = dataclasses.asdict(load_gpu(name))
        of_engines = facts.pop("engines")
        return facts | {f"{of}.{field}": value for of, own in of_engines.items() for field, value in own.items()}
    try:
        model = load_model(name)
    except CatalogueError:
        if Path(name).exists():
            raise  # what is wrong with the file
    else:
        weights = {f"weight_bytes_{dtype}": int(model.weight_bytes(model.precision(dtype))) for dtype in WEIGHTS}
        saved = {
            "saved_as": model.saved
            if isinstance(model.saved, str)
            else weights_label({"weights": model.saved.described})
        }
        return _model_row(model) | saved | weights | _shape(model)
    names = {known.lower(): known for known in (*gpu_names(), *model_names())}
    near = [names[each] for each in difflib.get_close_matches(name.lower(), names, 3, 0.4)]
    raise CatalogueError(
        f"no GPU or model {name!r}; " + (f"nearest: {', '.join(near)}" if near else "see workbench catalogue")
    )


SHAPE = (
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate",
    "vocab",
    "tied_embeddings",
    "gated_mlp",
    "experts",
    "experts_per_token",
    "expert_intermediate",
    "moe_layers",
    "windows",
    "drafting_layers",
)
"""Sizes of a model: of its first layer of attention, its first dense MLP and its first experts."""


def _shape(model: ModelSpec) -> dict[str, Any]:
    """A model's sizes, and how many layers it has of each kind."""
    kinds: dict[str, int] = {}
    for layer in model.stack:
        words = ", ".join(each.described for each in (layer.mixer, layer.mlp) if each is not None)
        kinds[words] = kinds.get(words, 0) + 1
    return {
        **{name: getattr(model, name) for name in SHAPE},
        "kv_saved_as": model.saved_kv,
        "state_bytes_per_request": int(model.state_bytes()),
        "layer_kinds": kinds,
    }


def _print_one(found: dict[str, Any]) -> None:
    for field, value in found.items():
        if isinstance(value, tuple):  # of every layer: what there is, and how often
            kinds = {kind: value.count(kind) for kind in dict.fromkeys(value)}
            value = ", ".join(f"{kind} in {count} layers" for kind, count in kinds.items())
        elif isinstance(value, dict):
            value = "; ".join(f"{count} x {kind}" for kind, count in value.items())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = _number(value)
        print(f"{field:28}{value}")


def _number(value: float) -> str:
    for size, prefix in ((1e12, " T"), (1e9, " G")):
        if value >= size:
            return f"{value / size:.4g}{prefix}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _print_all(gpus: list[dict[str, Any]], models: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Lines that another program reads are not cut; on a narrow terminal names are folded, and no number is cut.
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for titles, rows in (
        (
            ("GPU", "memory GiB", "TB/s", "bf16 TFLOP/s", "fp8", "link GB/s", "a node"),
            [
                (
                    g["gpu"],
                    f"{g['memory_gib']:.0f}",
                    f"{g['bandwidth_tb_per_s']:.2f}",
                    f"{g['bf16_tflops']:,.0f}",
                    f"{g['fp8_tflops']:,.0f}" if g["fp8_tflops"] else "-",
                    f"{g['link_gb_per_s']:.0f}{' (PCIe)' if g['pcie_link'] else ''}",
                    str(g["gpus_per_node"]),
                )
                for g in gpus
            ],
        ),
        (
            ("model", "weights", "active", "layers", "KV KiB/token", "context"),
            [
                (
                    m["model"],
                    f"{m['parameters'] / 1e9:.1f}B",
                    f"{m['active_parameters'] / 1e9:.1f}B",
                    str(m["layers"]),
                    f"{m['kv_bytes_per_token'] / 1024:.0f}",
                    f"{m['max_context']:,}",
                )
                for m in models
            ],
        ),
    ):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, title in enumerate(titles):
            table.add_column(title, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    console.print(
        "workbench catalogue NAME shows one with its sources; a TOML file, a folder or a config.json works as well.",
        highlight=False,
        soft_wrap=True,
    )
