"""Tiny random models made by transformers, and the smallest driver that runs ours over a paged KV pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.torch.forward_batch import ForwardBatch, KVPool
from backends.torch.models.decoder import Model

VOCAB = 200
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that greedy choices are clear and that every layer matters.
    "initializer_range": 0.15,
}
PROMPT_LENGTHS = (21, 5, 34)


def make(architecture: str, folder: Path, **changes: Any) -> Any:
    """A random transformers model of an architecture, saved to ``folder`` in several shards."""
    import transformers

    family = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = family(family.config_class(**{**COMMON, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts norms at one and biases at zero, which would hide a mix-up of either.
            if name.endswith("norm.weight") or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    """Random token ids, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def reference(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], Tensor]:
    """transformers' own greedy continuation, and its logits at every position of prompt and continuation."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist(), model(out).logits[0].float()


class Driver:
    """Runs requests over the stages of a model: page tables, chunks of prompts, prompts and decodes in one batch."""

    def __init__(self, stages: list[Model], requests: int, *, page_size: int = 16, context: int = 128) -> None:
        self.stages, self.page_size = stages, page_size
        first = stages[0]
        dtype, device = first.layers[0].input_norm.weight.dtype, first.cos_sin.device
        pages = -(-context // page_size)
        # Rows and pages in no order: nothing may rely on neighbours.
        order = torch.randperm((requests + 1) * pages, generator=torch.Generator().manual_seed(2))
        self.page_table = order.view(requests + 1, pages).to(torch.int32).to(device)
        self.rows = list(range(requests, 0, -1))
        self.device = device
        self.pools = [
            KVPool.allocate(
                len(stage.layers), len(order) * page_size, stage.kv_heads, stage.config.head_dim, dtype, device
            )
            for stage in stages
        ]

    def batch(self, prefills: list[tuple[int, int, list[int]]], decodes: list[tuple[int, int, int]]) -> ForwardBatch:
        """prefills: (request, its first position, tokens); decodes: (request, position, token)."""
        work = prefills + [(request, at, [token]) for request, at, token in decodes]
        tokens, positions, slots = [], [], []
        for request, start, ids in work:
            tokens += ids
            for position in range(start, start + len(ids)):
                positions.append(position)
                page = int(self.page_table[self.rows[request], position // self.page_size])
                slots.append(page * self.page_size + position % self.page_size)
        lengths = [len(ids) for _, _, ids in prefills]

        def ints(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        return ForwardBatch(
            input_ids=ints(tokens),
            positions=ints(positions),
            slots=ints(slots),
            rows=ints([self.rows[request] for request, _, _ in work]),
            seq_lens=ints([start + len(ids) for _, start, ids in work], torch.int32),
            page_table=self.page_table,
            page_size=self.page_size,
            num_prefill=len(prefills),
            prefill_tokens=sum(lengths),
            q_starts=ints([sum(lengths[:i]) for i in range(len(lengths) + 1)], torch.int32) if prefills else None,
            max_extend=max(lengths, default=1),
        )

    @torch.no_grad()
    def run(self, batch: ForwardBatch) -> Tensor:
        """Logits of every token of the batch, float32[n, vocab]."""
        hidden: Tensor | None = None
        for stage, pool in zip(self.stages, self.pools, strict=True):
            hidden = stage.forward(batch, pool, hidden)
        assert hidden is not None
        return self.stages[-1].logits(hidden)

    def generate(
        self, inputs: list[list[int]], new_tokens: int, chunk: int = 8
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Greedy continuations and the logits at every computed position.

        Request i joins at step i, prompts are computed in chunks, and whoever is past its prompt decodes meanwhile.
        """
        outputs: list[list[int]] = [[] for _ in inputs]
        computed = [0] * len(inputs)
        seen: list[list[Tensor]] = [[] for _ in inputs]
        step = 0
        while any(len(out) < new_tokens for out in outputs):
            prefills, decodes = [], []
            for i, prompt in enumerate(inputs[: step + 1]):
                if computed[i] < len(prompt):
                    prefills.append((i, computed[i], prompt[computed[i] : computed[i] + chunk]))
                elif len(outputs[i]) < new_tokens:
                    decodes.append((i, computed[i], outputs[i][-1]))
            logits = self.run(self.batch(prefills, decodes))
            at = 0
            for i, start, ids in [*prefills, *((i, start, [token]) for i, start, token in decodes)]:
                seen[i].append(logits[at : at + len(ids)])
                at += len(ids)
                computed[i] = start + len(ids)
                if computed[i] >= len(inputs[i]):
                    outputs[i].append(int(logits[at - 1].argmax()))
            step += 1
        return outputs, [torch.cat(parts) for parts in seen]
