"""Costs of the CPU phases of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from workbench.scheduler.batch import ModelWorkerBatch

GAPS = ("gap_s", "gap_request_s", "gap_rank_s", "gap_recurrent_s", "gap_sparse_s", "gap_expert_token_s")


@dataclass(frozen=True)
class HostModel:
    """Seconds of CPU per phase, as a function of the batch.

    The defaults are an assumption, not a measurement: they put the CPU share of a decode step of an 8B model on a fast
    GPU near the tenth that engines report to gain by overlapping it. Calibration replaces them.
    """

    receive_s: float = 10e-6
    receive_message_s: float = 15e-6
    """Per message: unpacking and queueing it."""
    schedule_s: float = 60e-6
    schedule_request_s: float = 0.5e-6
    schedule_prefill_s: float = 20e-6
    """Per request that is prefilled: prefix look-up, row and pages."""
    schedule_token_s: float = 0.0
    """Per prompt token."""
    prepare_s: float = 150e-6
    """First part of launch: staging the inputs."""
    prepare_request_s: float = 0.5e-6
    prepare_token_s: float = 0.0
    """Per prompt token."""
    prepare_rank_s: float = 0.0
    """Per GPU beside the first: telling its worker of the step, and hearing from it."""
    graph_s: float = 60e-6
    """Second part of launch: replaying a captured graph. The GPU starts after it."""
    eager_s: float = 100e-6
    """Second part of launch without a graph. The GPU starts with its first kernel and cannot end before its last."""
    eager_layer_s: float = 35e-6
    process_s: float = 60e-6
    process_token_s: float = 2e-6
    """Per sampled token: appending, checking, handing it on."""
    process_ended_s: float = 30e-6
    """Per request that ends: cache insertion and release."""
    gap_s: float = 0.0
    """Between two steps of the GPU, whatever overlaps: preparing one that waits for the other (cost/step_gaps.py)."""
    gap_request_s: float = 0.0
    gap_rank_s: float = 0.0
    """Per GPU beside the first."""
    gap_recurrent_s: float = 0.0
    """Per layer with a recurrence: small kernels of that version, which hold neither the roofline nor tables."""
    gap_sparse_s: float = 0.0
    """Likewise, per layer that attends to chosen tokens."""
    gap_expert_token_s: float = 0.0
    """Likewise, per prompt token and layer with experts: choosing, sorting and gathering, which every GPU does for all."""
    mask_s: float = 50e-6
    """Per row that samples under a grammar: its mask, and following what it has sampled. Other batches have none."""
    graph_max_batch: int = 256
    """Decode batches up to this size replay a graph; 0 when graphs are off."""
    layers: int = 32
    """Layers that one worker launches: the stage's."""
    ranks: int = 1
    """GPUs that run a step together: the tensor-parallel group's."""
    _eager_s: float = field(init=False, repr=False, default=0.0)
    _prepare_s: float = field(init=False, repr=False, default=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_eager_s", self.eager_s + self.eager_layer_s * self.layers)
        object.__setattr__(self, "_prepare_s", self.prepare_s + self.prepare_rank_s * (self.ranks - 1))

    def receive(self, messages: int) -> float:
        return self.receive_s + self.receive_message_s * messages

    def schedule(self, batch: ModelWorkerBatch) -> float:
        return (
            self.schedule_s
            + self.schedule_request_s * len(batch.rows)
            + self.schedule_prefill_s * batch.num_prefill
            + self.schedule_token_s * batch.prefill_tokens
        )

    def launch(self, batch: ModelWorkerBatch) -> tuple[float, float, bool]:
        """(seconds before the first kernel, seconds that issue kernels, whether a graph is replayed)."""
        requests = len(batch.rows)
        graph = not batch.num_prefill and requests <= self.graph_max_batch
        prepare_s = self._prepare_s + self.prepare_request_s * requests
        prepare_s += self.prepare_token_s * batch.prefill_tokens
        return prepare_s, self.graph_s if graph else self._eager_s, graph

    def process(self, batch: ModelWorkerBatch, ended: int) -> float:
        return self.process_s + self.process_token_s * batch.num_samples + self.process_ended_s * ended


FREE_HOST = HostModel(
    receive_s=0,
    receive_message_s=0,
    schedule_s=0,
    schedule_request_s=0,
    schedule_prefill_s=0,
    prepare_s=0,
    prepare_request_s=0,
    graph_s=0,
    eager_s=0,
    eager_layer_s=0,
    process_s=0,
    process_token_s=0,
    process_ended_s=0,
    mask_s=0,
)
"""A CPU that costs nothing: what a step takes without it."""
