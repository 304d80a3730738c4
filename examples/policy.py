"""An order of the waiting queue of one's own: short prompts first, but nobody is forgotten.

Shortest-first keeps the mean wait low and lets long prompts wait without end. Here every second of waiting makes a prompt
count as if it were shorter, so that the long ones get their turn.

    python examples/policy.py
    workbench simulate trace.jsonl --policy examples.policy:ShortestAged
"""

import numpy as np

import workbench

TOKENS_A_SECOND = 5_000
"""What a second of waiting is worth."""


class ShortestAged(workbench.Policy):
    """Fewest prompt tokens first, less what the request has waited."""

    def order(self, waiting, view):
        return sorted(waiting, key=lambda req: len(req.tokens) - TOKENS_A_SECOND * (view.now_s - req.arrival_s))


def burst(seed=0):
    """Two hundred requests in twenty seconds: mostly short prompts, every tenth a long one."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(200) < 0.1, 16_000, rng.integers(100, 2_000, 200))
    return [workbench.TraceRequest(f"r{i}", i / 10, int(length), 100) for i, length in enumerate(lengths)]


if __name__ == "__main__":
    for policy in ("fcfs", "sjf", ShortestAged):
        # Without a bound of its own on passing over, so that only the policy decides.
        record = workbench.simulate(burst(), policy=policy, max_running=16, max_passed_over=None)
        ttft_s = record.requests["first_token_s"] - record.requests["arrival_s"]
        name = policy if isinstance(policy, str) else policy.__name__
        print(f"{name:12}  mean TTFT {ttft_s.mean():6.2f} s   worst {ttft_s.max():6.2f} s")
