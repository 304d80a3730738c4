"""Keys that a file or a page documents exist, and those that exist are documented."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.cost.models.exchange import ExchangeRule
from backends.simulated.front_end import FrontEndModel
from backends.simulated.host import HostModel
from backends.simulated.kv_windows import KvRule
from workbench.search.prices import ENTRIES
from workbench.settings.engines import GPU_KEYS, GRAPH_KEYS, SHARED_KEY, Engine
from workbench.settings.run_settings import RunSettings

ROOT = Path(__file__).parents[1]
ENGINES = ROOT / "workbench/settings/engines.toml"


TABLES = {"exchange", "shared", "graphs", "host", "kv", "front_end", "gpus", "offers"}


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


KV_KEYS = names(KvRule) - {"keeps"}
"""What `[NAME.kv]` may hold: what a user chooses is no engine's."""


def comments(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


def test_engines_toml_documents_the_keys_it_may_hold():
    head = ENGINES.read_text().split("\n\n")[0]
    listed = set(re.findall(r"^# (\w+) {2,}\w", head, re.M))
    own = names(Engine) - {"name", "settings", *TABLES}
    assert listed == {*own, "extends"}
    assert {name for name in TABLES if re.search(rf"^# \[+NAME\.{name}\]+ ", head, re.M)} == TABLES
    assert set(re.findall(r"`(\w+)`", head)) == GRAPH_KEYS | KV_KEYS | GPU_KEYS | names(ExchangeRule) | {SHARED_KEY}


def test_engines_toml_holds_only_keys_that_are_read():
    own = names(Engine) - {"name", "settings"} | {"extends"}
    tables = tomllib.loads(ENGINES.read_text())
    assert set(tables.pop("short").values()) <= set(tables)
    for preset in tables.values():
        assert set(preset) <= own | names(RunSettings)
        assert set(preset.get("graphs", {})) <= GRAPH_KEYS
        assert set(preset.get("host", {})) <= names(HostModel)
        assert set(preset.get("kv", {})) <= KV_KEYS
        assert set(preset.get("front_end", {})) <= names(FrontEndModel)
        assert set(preset.get("offers", {})) <= names(RunSettings)
        for case in preset.get("gpus", ()):
            assert set(case) <= GPU_KEYS | names(RunSettings)
        assert set(preset.get("exchange", {})) <= names(ExchangeRule)
        assert set(preset.get("shared", {})) <= names(RunSettings) | {SHARED_KEY}


def test_gpus_toml_documents_and_holds_only_fields_of_a_gpu():
    path = ROOT / "backends/simulated/catalogue/gpus.toml"
    known = names(GPU) | {"efficiency_like"}
    assert set(re.findall(r"`(\w+)`", comments(path))) <= known
    for wildcard in re.findall(r"\*(_\w+)", comments(path)):
        assert any(name.endswith(wildcard) for name in known)
    for gpu in tomllib.loads(path.read_text()).values():
        assert set(gpu) <= known


def test_the_example_of_prices_documents_and_holds_only_what_is_read():
    path = ROOT / "docs/prices-example.toml"
    assert set(re.findall(r"`(\w+)`", comments(path))) | set(tomllib.loads(path.read_text())) <= set(ENTRIES)
