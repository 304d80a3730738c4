"""Published configurations of the families people deploy, as tests take them.

The fields of their config.json are in the catalogue. `model_families.json` has the `parameters` that test_model_families.py
counts, and the figure that is `published`, as it is written, with the address of the page that was read for it, its
`source`: the makers' own where it was found, else a copy of the checkpoint or a list of models. Where none was found,
`from_memory` says where the figure is remembered to stand. `beside_b` are billions that it counts and the language model
does not have, which `beside` names.
"""

from __future__ import annotations

import json
from pathlib import Path

from backends.simulated.catalogue.model_specs import CATALOGUE, ModelSpec, from_config

FAMILIES = json.loads((Path(__file__).parent / "model_families.json").read_text())
CONFIGS = json.loads(CATALOGUE.read_text())


def family(name: str, **fields: object) -> ModelSpec:
    """One of them, with other fields."""
    config = CONFIGS[name]
    inner = {"text_config": {**config["text_config"], **fields}} if "text_config" in config else fields
    return from_config({**config, **inner}, name, "config.json")
