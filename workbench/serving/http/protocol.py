"""What clients may say, and the checks before anything of it reaches the scheduler."""

from __future__ import annotations

import codecs
import json
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec

from workbench.scheduler.request import SamplingParams
from workbench.serving.http.fields import Unsupported, without_neutral

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_SEQUENCES = 256
"""Prompts times choices of one request."""
MAX_LOGPROBS = 20
COMPLETION_MAX_TOKENS = 16
"""Output bound of /v1/completions when none is given: OpenAI's."""


class ApiError(Exception):
    """An answer other than success, in the shape of OpenAI's errors."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    """At the end, in an event of its own."""
    continuous_usage_stats: bool | None = None
    """In every event, of its choice so far."""


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that all generation endpoints share. None means: not given."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None


class OpenAISampling(Sampling, kw_only=True, forbid_unknown_fields=True):
    """Fields that both OpenAI endpoints share."""

    parts: ClassVar[dict[str, Any]] = {"stream_options": StreamOptions}
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


class CompletionRequest(OpenAISampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    where: ClassVar[str] = "completions"
    prompt: Any
    logprobs: int | None = None
    max_completion_tokens: int | None = None


class ChatRequest(OpenAISampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    where: ClassVar[str] = "chat"
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Asked(Protocol):
    """What a request of any generation endpoint says beside its prompt and its sampling.

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


class UpdateWeightsRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /update_weights_from_disk."""

    model_path: str


class StartProfileRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /start_profile."""

    output_dir: str
    num_steps: int | None = None


@dataclass(frozen=True)
class Limits:
    """What the engine can take."""

    max_context: int
    kv_tokens: int
    vocab: int
    logprobs: bool
    backend: str
    default_max_tokens: int
    ignore_eos: bool
    """Of requests that do not say."""

    @property
    def longest_prompt(self) -> int:
        """The context holds the prompt, at least one new token, and the position after it."""
        return min(self.max_context - 2, self.kv_tokens - 1)


@dataclass(frozen=True)
class Sequences:
    """A checked request: every prompt, ``n`` times."""

    prompts: list[list[int]]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    skip_special_tokens: bool = True
    request_id: str | None = None
    session: str = ""
    """The session that the prompt continues, if any."""
    bos_tokens: int = 0
    """Leading tokens of the prompt that begin a text (BOS): left out of a later turn."""
    cache_salt: str = ""
    """Prefixes are shared with requests of the same salt only."""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    label: str | None = None
    """The id that the client's side has for it (``x-request-id``): /abort and the record take it, too."""


_FREE_FORM = ("messages", "chat_template_kwargs")
"""Fields whose values are for the chat template, which may tell 1.0 from 1."""


def parse(body: bytes, kind: Any) -> Any:
    """A body as ``kind``. Raises ApiError 400 that names what is wrong."""
    try:
        given = msgspec.json.decode(body.removeprefix(codecs.BOM_UTF8))
        if isinstance(given, dict):
            given = _cleaned(given, kind)
        return msgspec.convert(given, kind)
    except Unsupported as error:
        raise ApiError(400, str(error), param=error.param, code="unsupported_parameter") from error
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {_why_not_json(body, error)}", code="invalid_json") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error


def _why_not_json(body: bytes, error: Exception) -> str:
    """What is wrong with the body, where the decoder's own words would not be true of the whole of it."""

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
    """Without the fields that ask for nothing, and with whole numbers as such."""
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
    """Numbers like 8.0 as 8, in lists and objects, too: JSON has one kind of number, and some languages write it so."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1 << 63 else value
    if isinstance(value, list):
        return value if set(map(type, value)) <= {int, str} else [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return value


def parse_settings(body: bytes) -> dict[str, Any]:
    """The body of POST /settings; what the values mean is the scheduler's to check. Raises ApiError 400."""
    settings: dict[str, Any] = parse(body, dict[str, Any])
    for name, value in settings.items():
        # Anything else could not be sent on: messages between processes have 64-bit numbers.
        if isinstance(value, list | dict) or (isinstance(value, int) and abs(value) >= 1 << 63):
            raise bad_value(name, f"{str(value)[:40]} is nothing that a setting may be")
    return settings


def _invalid(message: str) -> ApiError:
    unknown = re.match(r"Object contains unknown field `(.*?)`(?: - at `\$\.?(.*)`)?$", message)
    if unknown:
        name = ".".join(part for part in (unknown[2], unknown[1]) if part)
        return ApiError(400, f"{name}: unknown field", param=name, code="unknown_parameter")
    missing = re.match(r"Object missing required field `(.*?)`", message)
    if missing:
        return ApiError(400, f"{missing[1]}: is required", param=missing[1], code="missing_required_parameter")
    at = re.search(r" - at `\$\.?(.*)`$", message)
    if at and "out of range" in message:  # found before the fields are known
        return ApiError(
            400, f"the body has a number that cannot be held: {message[: at.start()].lower()}", code="invalid_json"
        )
    if at:
        text = message[: at.start()]
        return ApiError(
            400, f"{at[1] or 'body'}: {text[0].lower()}{text[1:]}", param=at[1] or None, code="invalid_type"
        )
    return ApiError(400, message, code="invalid_type")


class Count(NamedTuple):
    """A number of tokens, and the name under which the client gave it."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Counts:
    """What a request says under different names at different endpoints."""

    max_tokens: Count
    min_tokens: Count
    logprobs: Count | None
    """Likely tokens to report with the log probability of each that is sampled; None: nothing is reported."""


def count(default: int, **given: int | None) -> Count:
    """A number by whichever of its names it was given. Raises ApiError 400 where two of them differ, or for one that counts
    nothing."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(set(found.values())) > 1:
        name, other = list(found)[:2]
        raise bad_value(name, f"is another name of {other}, and they differ ({found[name]} and {found[other]})")
    for name, value in found.items():
        if not 0 <= value < 1 << 31:
            raise bad_value(name, f"{value} is {'less than 0' if value < 0 else 'too large'}")
    return Count(*next(iter(found.items()), (next(iter(given)), default)))


def openai_counts(asked: CompletionRequest | ChatRequest, default_max_tokens: int, logprobs: Count | None) -> Counts:
    """The counts of a request of an OpenAI endpoint. Raises ApiError 400 as :func:`count` does."""
    given = {"max_tokens": asked.max_tokens, "max_completion_tokens": asked.max_completion_tokens}
    most = count(default_max_tokens, **given)
    return Counts(most, count(0, min_tokens=asked.min_tokens), logprobs)


def chat_logprob_count(asked: ChatRequest) -> Count | None:
    """The log probabilities that a chat wants. Raises ApiError 400 for likely tokens beside none."""
    if asked.logprobs:
        return Count("logprobs", 0) if asked.top_logprobs is None else count(0, top_logprobs=asked.top_logprobs)
    if asked.top_logprobs:
        raise bad_value("top_logprobs", "needs logprobs to be true")
    return None


def sampling_params(given: Sampling, counts: Counts, limits: Limits) -> SamplingParams:
    """Check values and fill in what was not given."""
    temperature = _number("temperature", given.temperature, 1.0, 0, 100)
    top_k = given.top_k if given.top_k is not None else 0
    if top_k < -1:
        raise bad_value("top_k", f"{top_k} is less than 1 (0 or -1: all tokens)")
    most, least, logprobs = counts.max_tokens, counts.min_tokens, counts.logprobs
    if least.tokens > most.tokens:
        raise bad_value(least.name, f"{least.tokens} is not between 0 and {most.name} ({most.tokens})")
    if given.seed is not None and not -(1 << 63) <= given.seed < 1 << 63:
        raise bad_value("seed", f"{given.seed} does not fit 64 bits")
    stop_token_ids = tuple(given.stop_token_ids or ())
    for token in stop_token_ids:
        _token("stop_token_ids", token, limits)
    if logprobs is not None:
        if logprobs.tokens > MAX_LOGPROBS:
            raise bad_value(logprobs.name, f"{logprobs.tokens} is not between 0 and {MAX_LOGPROBS}")
        if not limits.logprobs:
            raise ApiError(
                400,
                f"{logprobs.name}: the {limits.backend} backend has no probabilities to report",
                param=logprobs.name,
                code="unsupported_parameter",
            )
    return SamplingParams(
        max_new_tokens=most.tokens,
        ignore_eos=limits.ignore_eos if given.ignore_eos is None else given.ignore_eos,
        stop_token_ids=stop_token_ids,
        min_new_tokens=least.tokens,
        temperature=temperature,
        top_k=min(max(top_k, 0), limits.vocab),
        top_p=_number("top_p", given.top_p, 1.0, 0, 1, above=True),
        min_p=_number("min_p", given.min_p, 0.0, 0, 1),
        repetition_penalty=_number("repetition_penalty", given.repetition_penalty, 1.0, 0, 100, above=True),
        presence_penalty=_number("presence_penalty", given.presence_penalty, 0.0, -2, 2),
        frequency_penalty=_number("frequency_penalty", given.frequency_penalty, 0.0, -2, 2),
        logit_bias=_logit_bias(given.logit_bias, limits),
        seed=given.seed,
        logprobs=None if logprobs is None else logprobs.tokens,
    )


def _number(name: str, value: float | None, default: float, low: float, high: float, *, above: bool = False) -> float:
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise bad_value(
            name, f"{value:g} is not {'above' if above else 'between'} {low:g} and {'at most ' * above}{high:g}"
        )
    return float(value)


def _logit_bias(given: dict[str, float] | None, limits: Limits) -> tuple[tuple[int, float], ...]:
    biases = []
    for key, value in (given or {}).items():
        if not re.fullmatch(r"[0-9]{1,19}(\.0*)?", key):
            raise bad_value("logit_bias", f"{key!r} is not a token id")
        token = int(key.partition(".")[0])
        _token("logit_bias", token, limits)
        biases.append((token, _number("logit_bias", value, 0.0, -100, 100)))
    return tuple(biases)


def stop_strings(given: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple, checked."""
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MAX_STOPS:
        raise bad_value("stop", f"{len(stops)} strings are more than {MAX_STOPS}")
    for stop in stops:
        if not stop:
            raise bad_value("stop", "an empty string would stop at once")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise bad_value("stop", f"a string of {len(stop)} characters is longer than {MAX_STOP_CHARACTERS}")
    return stops


def choices(n: int | None, prompts: int) -> int:
    """Choices a prompt, checked."""
    n = 1 if n is None else n
    if n < 1:
        raise bad_value("n", f"{n} is less than 1")
    if n * prompts > MAX_SEQUENCES:
        raise bad_value("n", f"{prompts} prompts times n of {n} are more than {MAX_SEQUENCES} sequences")
    return n


def check_priority(value: int | None) -> int:
    value = value or 0
    if not -(1 << 31) <= value < 1 << 31:
        raise bad_value("priority", f"{value} does not fit 32 bits")
    return value


def check_prompt(prompt: list[int], limits: Limits, param: str) -> None:
    """Raise ApiError for a prompt that can never be served."""
    if not prompt:
        raise bad_value(param, "is empty")
    check_length(len(prompt), limits, param)
    if min(prompt) < 0 or max(prompt) >= limits.vocab:
        bad = next(token for token in prompt if not 0 <= token < limits.vocab)
        _token(param, bad, limits)


def check_length(tokens: int, limits: Limits, param: str, at_least: bool = False) -> None:
    """Raise ApiError for so many tokens of a prompt, or ``at_least`` so many, if that is more than can be served."""
    longest = limits.longest_prompt
    if tokens > longest:
        message = (
            f"{'at least ' * at_least}{tokens} tokens are more than the {longest} that fit the context with an answer"
        )
        raise ApiError(400, f"{param}: {message}", param=param, code="context_length_exceeded")


def prompt_list(prompt: Any) -> list[str | list[int]]:
    """The four shapes of ``prompt`` as a list of texts and token lists."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(_is_token(item) for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return list(prompt)
        if all(isinstance(item, list) and item and all(_is_token(token) for token in item) for item in prompt):
            return list(prompt)
    raise bad_value(
        "prompt", "must be text, a list of texts, a list of token ids, or a list of such lists, and not empty"
    )


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their content as plain text, for a chat template."""
    if not messages:
        raise bad_value("messages", "is empty")
    plain = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        for name, value in message.items():
            if name not in ("role", "content", "name") and value not in (None, []):
                param = f"{where}.{name}"
                if name in ("tool_calls", "tool_call_id", "function_call", "audio", "refusal", "annotations"):
                    what, code = "not supported by this server", "unsupported_parameter"
                else:
                    what, code = "unknown field", "unknown_parameter"
                raise ApiError(400, f"{param}: {what}", param=param, code=code)
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise bad_value(f"{where}.role", f"{role!r} is not one of system, developer, user, assistant")
        plain.append({"role": role, "content": _content(message.get("content"), f"{where}.content")})
    return plain


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        texts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad_value(where, "only parts of type text are supported")
            texts.append(part["text"])
        return "\n".join(texts)
    raise bad_value(where, "must be text or a list of text parts")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token(param: str, token: int, limits: Limits) -> None:
    if not 0 <= token < limits.vocab:
        raise bad_value(param, f"{token} is not a token of the vocabulary of {limits.vocab}")


def bad_value(param: str, what: str) -> ApiError:
    """The error for a field whose value cannot be taken."""
    return ApiError(400, f"{param}: {what}", param=param, code="invalid_value")
