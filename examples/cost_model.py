"""A cost model of one's own: a step is either bound by memory or by arithmetic, and nothing else counts.

The roofline that comes with the workbench looks at every operator. This one has two terms, and shows how far one gets.

    python examples/cost_model.py
    workbench simulate trace.jsonl --cost examples.cost_model:TwoTerms
"""

import workbench
from traces import sample_path


class TwoTerms:
    """Weights and KV read from memory, or FLOPs of the weights: the longer of the two, at the datasheet's rates."""

    def __init__(self, want: workbench.CostRequest):
        model, gpu = want.model, want.gpu
        self.weights_s = model.weight_bytes(want.weights, want.tp, want.pp) / gpu.memory_bandwidth
        self.context_token_s = model.kv_bytes_per_token(want.kv_dtype, want.tp, want.pp) / gpu.memory_bandwidth
        self.token_s = 2 * model.active_parameters / gpu.flops_for(want.dtype) / (want.tp * want.pp)
        self.hidden_s = 2 * model.hidden / gpu.link_bandwidth
        self.notes = ["step times have two terms: memory and arithmetic"]  # the report says it

    def forward(self, batch, stage=0):
        """Seconds that one stage computes."""
        memory_s = self.weights_s + self.context_token_s * batch.context_tokens
        return max(memory_s, self.token_s * (batch.prefill_tokens + batch.decode_tokens))

    def transfer_s(self, batch, stage=0):
        """Seconds that hidden states take to the next stage."""
        return self.hidden_s * (batch.prefill_tokens + batch.decode_tokens)


if __name__ == "__main__":
    for cost in ("roofline", TwoTerms):
        record = workbench.simulate(sample_path(), requests=60, cost=cost)
        gaps_s, count = record.itl
        name = cost if isinstance(cost, str) else cost.__name__
        print(f"{name:10}  mean gap between tokens {1e3 * (gaps_s * count).sum() / count.sum():.2f} ms")
