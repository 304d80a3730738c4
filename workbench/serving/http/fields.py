"""Fields that clients send though this server has nothing behind them, and the values at which they ask for nothing.

Such a field is taken at such a value, because the answer is the same without it, and refused by name at any other. null asks
for nothing in every one of them. What is in neither this table nor a request's own fields is unknown, and refused.
docs/serving.md has the table (:func:`as_markdown`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_ANY: tuple[Any, ...] = (object(),)


class Unsupported(ValueError):
    """A field of the table that asks for something: ``param`` is its name."""

    def __init__(self, param: str, what: str) -> None:
        super().__init__(f"{param}: {what}")
        self.param = param


@dataclass(frozen=True)
class Neutral:
    """Fields of one kind."""

    names: tuple[str, ...]
    values: tuple[Any, ...]
    """At which they ask for nothing, beside null."""
    why: str
    clients: str
    """Who sends them, or whose fields they are."""
    where: tuple[str, ...] = ("completions", "chat", "generate")
    """The endpoints that take them, or the object inside a request."""

    def at(self, value: Any, n: int) -> bool:
        """Return whether ``value`` asks for nothing of a request of ``n`` choices."""
        if self.values is _ANY or value is None:
            return True
        if isinstance(value, dict):  # null asks for nothing in it, too
            value = {name: each for name, each in value.items() if each is not None}
        return _like(value, n) if self.names == ("best_of",) else any(_like(value, each) for each in self.values)


def _like(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


TABLE = (
    Neutral(
        ("user", "metadata", "safety_identifier"), _ANY, "labels who asks", "openai, LangChain, LiteLLM, Open WebUI"
    ),
    Neutral(("prompt_cache_key", "prompt_cache_retention"), _ANY, "a hint for OpenAI's caches", "openai, Zed, Codex"),
    Neutral(("store",), (False,), "nothing is kept", "openai, Vercel AI SDK"),
    Neutral(("service_tier",), ("auto", "default"), "there is one tier", "openai, LangChain"),
    Neutral(("best_of",), (), "at the value of `n`: the best of as many as are returned", "SGLang's and vLLM's bench"),
    Neutral(("echo",), (False,), "the default", "openai, SGLang's bench, LiteLLM", ("chat", "generate")),
    Neutral(("suffix",), ("",), "the default", "openai, Continue"),
    Neutral(("tools",), ([],), "none", "openai, LangChain, Vercel AI SDK", ("completions", "generate")),
    Neutral(("functions",), ([],), "none", "openai, LangChain"),
    Neutral(("function_call",), ("none", "auto"), "there are no functions", "openai, LangChain, LiteLLM"),
    Neutral(
        ("tool_choice",),
        ("none", "auto"),
        "there are no tools",
        "openai, LangChain, LiteLLM",
        ("completions", "generate"),
    ),
    Neutral(
        ("parallel_tool_calls",),
        (True, False),
        "there are no tools",
        "openai, LangChain, Vercel AI SDK",
        ("completions", "generate"),
    ),
    Neutral(
        ("response_format",), ({"type": "text"},), "the default", "openai, LlamaIndex, Vercel AI SDK", ("generate",)
    ),
    Neutral(("modalities",), (["text"], []), "the default", "openai, LangChain", ("completions", "chat")),
    Neutral(("audio", "prediction", "web_search_options", "moderation"), (), "", "openai's SDK with null, LiteLLM"),
    Neutral(("reasoning_effort", "verbosity"), ("medium",), "the default", "openai, LiteLLM, Vercel AI SDK"),
    Neutral(("logprobs",), (False,), "the default", "LlamaIndex, LiteLLM", ("completions", "sampling_params")),
    Neutral(("include_obfuscation",), (False,), "nothing is padded", "openai", ("stream_options",)),
    Neutral(
        ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        _ANY,
        "labels who asks, or is a hint for OpenAI's caches",
        "openai, openai-agents, Codex",
        ("responses",),
    ),
    Neutral(("store", "background"), (False,), "nothing is kept", "openai, openai-agents", ("responses",)),
    Neutral(("service_tier",), ("auto", "default"), "there is one tier", "openai", ("responses",)),
    Neutral(("truncation",), ("disabled",), "the default", "openai, openai-agents", ("responses",)),
    Neutral(("include",), ([],), "nothing more", "openai, openai-agents", ("responses",)),
    Neutral(
        ("reasoning",),
        ({}, {"effort": "medium"}),
        "the default",
        "openai, openai-agents",
        ("responses",),
    ),
    Neutral(
        (
            "previous_response_id",
            "conversation",
            "prompt",
            "max_tool_calls",
            "context_management",
        ),
        (),
        "",
        "openai's SDK with null",
        ("responses",),
    ),
    Neutral(("top_logprobs",), (0,), "none", "openai", ("responses",)),
    Neutral(("stream_options",), ({}, {"include_obfuscation": False}), "nothing is padded", "openai", ("responses",)),
    # Of vLLM
    Neutral(
        ("disable_fallback", "disable_any_whitespace", "disable_additional_properties"),
        (False,),
        "the default",
        "vLLM",
        ("structured_outputs",),
    ),
    Neutral(("structural_tag",), (), "", "vLLM", ("structured_outputs",)),
    Neutral(("use_beam_search", "early_stopping"), (False,), "the default", "vLLM's bench, LangChain"),
    Neutral(("length_penalty",), (1.0,), "only beams have one", "vLLM's bench, LangChain"),
    Neutral(
        ("spaces_between_special_tokens",),
        (True, False),
        "a fast tokenizer puts none",
        "vLLM, SGLang, LiteLLM",
        ("completions", "chat", "sampling_params"),
    ),
    Neutral(("detokenize",), (True,), "the default", "vLLM", ("completions", "chat", "sampling_params")),
    Neutral(("add_special_tokens",), (True,), "the default", "vLLM, lm-eval", ("completions",)),
    Neutral(("add_special_tokens",), (False,), "the default: the template writes them", "vLLM, lm-eval", ("chat",)),
    Neutral(("add_generation_prompt",), (True,), "the default", "vLLM", ("chat",)),
    Neutral(("continue_final_message",), (False,), "the default", "vLLM", ("chat",)),
    Neutral(
        ("stream_reasoning",),
        (True,),
        "the default",
        "SGLang",
        ("chat",),
    ),
    Neutral(("documents", "mm_processor_kwargs", "media_io_kwargs"), ([], {}), "none", "vLLM", ("completions", "chat")),
    Neutral(("chat_template",), (), "", "vLLM", ("chat",)),
    Neutral(("chat_template_content_format",), ("auto",), "the default", "vLLM", ("chat",)),
    Neutral(("bad_words", "logits_processors"), ([],), "none", "vLLM", ("completions", "chat", "sampling_params")),
    Neutral(
        (
            "truncate_prompt_tokens",
            "prompt_logprobs",
            "allowed_token_ids",
            "guided_decoding_backend",
            "structural_tag",
            "logits_processor_args",
            "vllm_xargs",
            "kv_transfer_params",
            "prompt_embeds",
            "thinking_token_budget",
            "repetition_detection",
            "nvext",
        ),
        (),
        "",
        "vLLM's and Dynamo's clients, genai-perf, aiperf with null",
    ),
    Neutral(
        (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_whitespace_pattern",
            "structured_outputs",
        ),
        (),
        "",
        "vLLM's and Dynamo's clients, genai-perf, aiperf with null",
        ("generate",),
    ),
    Neutral(("include_stop_str_in_output",), (False,), "the default", "vLLM", ("sampling_params",)),
    # Of SGLang
    Neutral(
        (
            "lora_path",
            "session_params",
            "bootstrap_host",
            "bootstrap_port",
            "bootstrap_room",
            "data_parallel_rank",
            "routed_dp_rank",
            "custom_logit_processor",
            "custom_params",
            "extra_key",
            "input_embeds",
            "custom_labels",
            "token_ids_logprob",
        ),
        (),
        "",
        "SGLang's bench and SDK with null",
        ("completions", "chat", "generate", "sampling_params"),
    ),
    Neutral(("image_data", "audio_data", "video_data"), ([],), "none", "SGLang", ("generate",)),
    Neutral(("modalities",), ([],), "none", "SGLang", ("generate",)),
    Neutral(("structural_tag",), (), "", "SGLang", ("sampling_params",)),
    Neutral(("n",), (1,), "the default", "SGLang", ("sampling_params",)),
    Neutral(("sampling_seed",), (), "", "SGLang", ("sampling_params",)),
    Neutral(("rid",), (), "", "SGLang", ("completions", "chat")),
    Neutral(("stream_interval",), (1,), "the default", "SGLang", ("sampling_params",)),
    Neutral(
        (
            "return_hidden_states",
            "return_routed_experts",
            "return_entropy",
            "return_bytes",
            "return_cached_tokens_details",
            "return_prompt_token_ids",
            "return_meta_info",
            "background",
        ),
        (False,),
        "the default",
        "SGLang's SDK",
    ),
    Neutral(
        ("log_metrics", "no_logs", "require_reasoning"),
        (True, False),
        "nothing of the answer",
        "SGLang's SDK",
        ("generate",),
    ),
)


def without_neutral(given: dict[str, Any], where: str, own: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """Return ``given`` without the fields that ask for nothing. ``own`` are those a request has itself.

    Raises Unsupported for a field of the table that asks for something; ``prefix`` goes before its name.
    """
    kept = dict(given)
    n = given.get("n") or 1
    for name, value in given.items():
        row = _ROWS.get((where, name))
        if row is None:
            continue
        if row.at(value, n):
            del kept[name]
        elif name not in own:
            shown = json.dumps(value)
            raise Unsupported(
                prefix + name, "not supported by this server" + (f" at {shown}" if len(shown) <= 40 else "")
            )
    return kept


_ROWS = {(where, name): row for row in TABLE for where in row.where for name in row.names}


def as_markdown() -> str:
    """Return the table as docs/serving.md has it."""
    lines = ["| taken at these values, beside null | because | of, or sent by |", "|---|---|---|"]
    for row in TABLE:
        values = "anything" if row.values is _ANY else ", ".join(f"`{json.dumps(value)}`" for value in row.values)
        if row.names == ("best_of",):
            values = "`n`"
        names = ", ".join(f"`{name}`" for name in row.names)
        place = "" if row.where == Neutral.where else f" ({', '.join(row.where)})"
        why = row.why or "it is not there, and null asks for nothing"
        lines.append(f"| {names}{place}{': ' if values else ''}{values} | {why} | {row.clients} |")
    return "\n".join(lines)
