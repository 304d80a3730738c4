"""How long a look-up of the profile cost model takes on the CPU, for one step of 256 requests.

    python benchmarks/profile_lookup.py [PROFILE | measured]

``measured`` is Llama-3.1-8B on an H100 under vLLM out of the published tables.
The shortest of many short rounds: what the code costs when nothing else runs beside it.
"""

from __future__ import annotations

import sys
import timeit
from pathlib import Path

import numpy as np

from backends.simulated.build_cost import build_cost
from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost import CostModel
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.tables.profiles import identity
from workbench.scheduler.batch import ModelWorkerBatch

DEFAULT = Path(__file__).resolve().parents[2] / (
    "shared/data/profiles/llmservingsim/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16"
)
REQUESTS = 256
GRAPHS = [1, 2, 4, *range(8, 257, 8)]


def batch(lens: np.ndarray, new: tuple[int, ...] = ()) -> ModelWorkerBatch:
    """A step of requests at ``lens`` tokens, of which the first compute ``new`` prompt tokens."""
    prompts, extend = len(new), np.array(new, np.int64)
    return ModelWorkerBatch(
        0,
        "mixed" if prompts else "decode",
        np.arange(len(lens)),
        0,
        lens,
        np.concatenate((extend, np.ones(len(lens) - prompts, np.int64))),
        prompts,
        len(lens),
        int(extend.sum()),
        len(lens) - prompts,
        int(lens.sum()),
        None,
        None,
        (),
        None,
        None,
        (),
        0,
        0,
        0,
    )


def cost_model() -> CostModel:
    """The cost model that the command line names."""
    if sys.argv[1:] == ["measured"]:
        model = load_model("meta-llama/Llama-3.1-8B")
        want = CostRequest(model, load_gpu("h100"), engine="vllm-0.33.0", capture_sizes=GRAPHS)
        return build_cost("measured", None, want)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not path.is_dir():
        sys.exit(f"error: {path}: no profile here")
    known = identity(path)
    want = CostRequest(load_model(known["model"]), load_gpu(known["gpu"]), capture_sizes=GRAPHS)
    return build_cost("profile", path, want)


def main() -> None:
    cost = cost_model()
    lens = np.random.default_rng(0).integers(200, 3000, REQUESTS)
    # A run never looks the same batch up twice: contexts grow, prompts differ.
    steps = [lens + i for i in range(200)]
    kinds = {
        "decode": [batch(step) for step in steps],
        "mixed, one prompt": [batch(step, (100 + i,)) for i, step in enumerate(steps)],
        "mixed, four prompts": [batch(step + 400, (100 + i, 150, 120 + i, 80)) for i, step in enumerate(steps)],
    }
    for name, batches in kinds.items():
        rounds = timeit.repeat(lambda batches=batches: [cost.forward(b) for b in batches], number=1, repeat=200)
        print(f"{name:22}{min(rounds) / len(batches) * 1e9:8,.0f} ns a step at {REQUESTS} requests")


if __name__ == "__main__":
    main()
