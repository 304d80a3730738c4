"""The bodies that clients send, as the service takes what they say."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, ClassVar, Protocol

import msgspec

from workbench.serving.http.fields import Unsupported, without_neutral
from workbench.serving.http.output_format import ResponseFormat, StructuredOutputs
from workbench.serving.refusals import Refusal, bad_value
from workbench.serving.sampling_params import Count, Counts, Sampling, count

COMPLETION_MAX_TOKENS = 16
"""Output bound of /v1/completions when none is given: OpenAI's."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    """At the end, in an event of its own."""
    continuous_usage_stats: bool | None = None
    """In every event, of its choice so far."""


class OpenAISampling(Sampling, kw_only=True, forbid_unknown_fields=True):
    """Fields that both OpenAI endpoints share."""

    parts: ClassVar[dict[str, Any]] = {"stream_options": StreamOptions, "structured_outputs": StructuredOutputs}
    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    request_id: str | None = None
    return_tokens_as_token_ids: bool | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    response_format: ResponseFormat | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    return_token_ids: bool | None = None


class CompletionRequest(OpenAISampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    where: ClassVar[str] = "completions"
    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None
    max_completion_tokens: int | None = None


class ChatRequest(OpenAISampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    where: ClassVar[str] = "chat"
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Asked(Protocol):
    """Fields of a request of any generation endpoint beside its prompt and its sampling.

    Written out in each, for a struct inherits from one other only.
    """

    priority: int | None
    request_id: str | None
    session_id: str | None
    cache_salt: str | None
    slo_ttft_s: float | None
    slo_tpot_s: float | None


class AbortRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /abort."""

    request_id: str | None = None
    all: bool = False


class OpenSessionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /open_session."""

    session_id: str | None = None


class CloseSessionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /close_session."""

    session_id: str


class UpdateWeightsRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /update_weights_from_disk."""

    model_path: str


class StartProfileRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /start_profile."""

    output_dir: str
    num_steps: int | None = None


_FREE_FORM = (
    *("messages", "chat_template_kwargs"),
    *("response_format", "guided_json", "json_schema", "structured_outputs", "tools", "input", "text"),
)
"""Fields whose values are for the chat template or for a grammar, which may tell 1.0 from 1."""


def parse(body: bytes, kind: Any) -> Any:
    """Return a body as ``kind``. Raises Refusal that names what is wrong."""
    try:
        given = msgspec.json.decode(body.removeprefix(codecs.BOM_UTF8))
        if isinstance(given, dict):
            given = _cleaned(given, kind)
        return msgspec.convert(given, kind)
    except Unsupported as error:
        raise Refusal("unsupported_parameter", str(error), error.param) from error
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal("invalid_json", f"the body is not valid JSON: {_why_not_json(body, error)}") from error
    except RecursionError as error:
        raise Refusal("invalid_json", "the body is nested too deeply") from error


def _why_not_json(body: bytes, error: Exception) -> str:
    """Return what is wrong with the body, where the decoder's own words would not be true of the whole of it."""

    def no_number(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(body.decode("utf-8-sig"), parse_constant=no_number)
    except UnicodeDecodeError as broken:
        return f"byte {broken.start} is not UTF-8"
    except (ValueError, RecursionError):
        return str(error)
    return "a text has half of a surrogate pair"  # the decoders differ in nothing else


def _cleaned(given: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Return the body without the fields that ask for nothing, and with whole numbers as such."""
    where = getattr(kind, "where", None)
    if where is not None:
        given = without_neutral(given, where, frozenset(kind.__struct_fields__))
        for name, part in kind.parts.items():
            own = frozenset(part.__struct_fields__)
            value = given.get(name)
            if isinstance(value, dict):
                given[name] = without_neutral(value, name, own, f"{name}.")
            elif isinstance(value, list):
                given[name] = [
                    without_neutral(each, name, own, f"{name}[{i}].") if isinstance(each, dict) else each
                    for i, each in enumerate(value)
                ]
    return {name: value if name in _FREE_FORM else _whole(value) for name, value in given.items()}


def _whole(value: Any) -> Any:
    """Return numbers like 8.0 as 8, in lists and objects, too: JSON has one kind of number, which some write so."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1 << 63 else value
    if isinstance(value, list):
        return value if set(map(type, value)) <= {int, str} else [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return value


def parse_settings(body: bytes) -> dict[str, Any]:
    """Return the body of POST /settings; what the values mean is the scheduler's to check. Raises Refusal."""
    settings: dict[str, Any] = parse(body, dict[str, Any])
    for name, value in settings.items():
        # Anything else could not be sent on: messages between processes have 64-bit numbers.
        if isinstance(value, list | dict) or (isinstance(value, int) and abs(value) >= 1 << 63):
            raise bad_value(name, f"{str(value)[:40]} is nothing that a setting may be")
    return settings


def _invalid(message: str) -> Refusal:
    unknown = re.match(r"Object contains unknown field `(.*?)`(?: - at `\$\.?(.*)`)?$", message)
    if unknown:
        name = ".".join(part for part in (unknown[2], unknown[1]) if part)
        return bad_value(name, "unknown field", "unknown_parameter")
    missing = re.match(r"Object missing required field `(.*?)`", message)
    if missing:
        return bad_value(missing[1], "is required", "missing_required_parameter")
    at = re.search(r" - at `\$\.?(.*)`$", message)
    if at and "out of range" in message:  # found before the fields are known
        return Refusal("invalid_json", f"the body has a number that cannot be held: {message[: at.start()].lower()}")
    if at:
        text = message[: at.start()]
        return Refusal("invalid_type", f"{at[1] or 'body'}: {text[0].lower()}{text[1:]}", at[1] or None)
    return Refusal("invalid_type", message)


def openai_counts(asked: CompletionRequest | ChatRequest, default_max_tokens: int, logprobs: Count | None) -> Counts:
    """Return the counts of a request of an OpenAI endpoint. Raises Refusal as :func:`count` does."""
    given = {"max_tokens": asked.max_tokens, "max_completion_tokens": asked.max_completion_tokens}
    most = count(default_max_tokens, **given)
    return Counts(most, count(0, min_tokens=asked.min_tokens), logprobs)


def chat_logprob_count(asked: ChatRequest) -> Count | None:
    """Return the log probabilities that a chat wants. Raises Refusal for likely tokens beside none."""
    if asked.logprobs:
        return Count("logprobs", 0) if asked.top_logprobs is None else count(0, top_logprobs=asked.top_logprobs)
    if asked.top_logprobs:
        raise bad_value("top_logprobs", "needs logprobs to be true")
    return None
