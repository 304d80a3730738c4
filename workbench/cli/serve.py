"""``workbench serve``: a model behind an HTTP API, under the scheduler and loops that ``simulate`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from workbench.cli import options
from workbench.cli.options import RUN, option

_SERVER, _MODELLED = "Server", "Simulated backend"


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder, GGUF file or id; simulated: also any model of the catalogue.", show_default=False
        ),
    ],
    backend: Annotated[
        str,
        option(
            "--backend",
            help="auto | cpu | cuda | simulated. Default auto: cuda if there is a GPU, else cpu.",
            panel=_SERVER,
        ),
    ] = "auto",
    host: Annotated[
        str, option("--host", help="Address to listen on. Default 127.0.0.1: this machine only.", panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, option("--port", help="Port; 0 takes a free one. Default 8000.", panel=_SERVER)] = 8000,
    api_key: Annotated[
        Optional[str],
        typer.Option(
            "--api-key",
            envvar="WORKBENCH_API_KEY",
            help="Key that clients must send as a bearer token.",
            rich_help_panel=_SERVER,
            show_default=False,
            show_envvar=True,
        ),
    ] = None,
    allow_origin: Annotated[
        Optional[list[str]],
        option(
            "--allow-origin",
            help="Origin whose pages may use the server, such as https://example.org:8443; repeatable; '*' is every page. Default: none.",
            panel=_SERVER,
        ),
    ] = None,
    allow_host: Annotated[
        Optional[list[str]],
        option(
            "--allow-host",
            help="Name that the server answers to beside localhost when it listens on the loopback without a key; repeatable; '*' is any.",
            panel=_SERVER,
        ),
    ] = None,
    trust_request_chat_template: Annotated[
        bool,
        option(
            "--trust-request-chat-template",
            help="Let requests bring a chat template in chat_template_kwargs. Default: refused.",
            panel=_SERVER,
        ),
    ] = False,
    profile_dir: Annotated[
        Optional[Path],
        option(
            "--profile-dir", help="Folder below which /start_profile writes. Default: it is refused.", panel=_SERVER
        ),
    ] = None,
    weights_dir: Annotated[
        Optional[Path],
        option(
            "--weights-dir", help="Folder below which /update_weights_from_disk reads. Default: any.", panel=_SERVER
        ),
    ] = None,
    served_model_name: Annotated[
        Optional[str], option("--served-model-name", help="What clients call the model. Default: MODEL.", panel=_SERVER)
    ] = None,
    tokenizer: Annotated[
        Optional[str],
        option(
            "--tokenizer",
            help="Folder or id of the tokenizer. Default: the model's; a simulated model without one writes bytes.",
            panel=_SERVER,
        ),
    ] = None,
    load_format: options.LoadFormat = "auto",
    max_queue: Annotated[
        int, option("--max-queue", help="Sequences that may queue; more are answered 503. Default 1000.", panel=_SERVER)
    ] = 1000,
    max_body_bytes: Annotated[
        int, option("--max-body-bytes", help="Largest request body. Default 16 MiB.", panel=_SERVER)
    ] = 16 << 20,
    stuck_after: Annotated[
        float,
        option(
            "--stuck-after",
            help="Seconds without a sign of life, or with work pending and nothing computed, after which /health fails. Default 60.",
            panel=_SERVER,
        ),
    ] = 60.0,
    drain_timeout: Annotated[
        float,
        option(
            "--drain-timeout", help="Seconds that requests have to finish after SIGTERM. Default 300.", panel=_SERVER
        ),
    ] = 300.0,
    record: Annotated[
        Optional[Path], option("--record", help="Folder for a run record and a trace of the traffic.", panel=RUN)
    ] = None,
    record_content: Annotated[
        bool,
        option(
            "--record-content/--no-record-content",
            help="Token ids in the trace, or lengths and prefix hashes only. Default: ids.",
            panel=RUN,
        ),
    ] = True,
    force: Annotated[bool, option("--force", help="Replace an earlier run in the record's folder.", panel=RUN)] = False,
    time_scale: Annotated[
        float,
        option("--time-scale", help="Real seconds per modelled second; 0 does not wait. Default 1.", panel=_MODELLED),
    ] = 1.0,
    simulated_output_tokens: Annotated[
        Optional[str],
        option(
            "--simulated-output-tokens",
            help="When answers end by themselves: N, A-B or lognormal:median=M,sigma=S[,max=N]. Default: only at max_tokens.",
            panel=_MODELLED,
        ),
    ] = None,
    loop: options.Loop = None,
    config: options.Config = None,
    slo_ttft: Annotated[
        Optional[float],
        option(
            "--slo-ttft",
            help="Seconds in which the first token of a request without an objective of its own is due: edf goes by it, goodput counts it.",
            panel=RUN,
        ),
    ] = None,
    slo_tpot: options.SloTpot = None,
    seed: options.Seed = None,
    gpu: options.Gpu = None,
    tp: options.Tp = None,
    pp: options.Pp = None,
    micro_batches: options.MicroBatches = None,
    ep: options.Ep = None,
    dtype: options.Dtype = None,
    kv_dtype: options.KvDtype = None,
    mem_fraction: options.MemFraction = None,
    kv_tokens: options.KvTokens = None,
    max_context: options.MaxContext = None,
    cuda_graphs: options.CudaGraphs = None,
    cost: options.Cost = None,
    batching: options.Batching = None,
    policy: options.Policy = None,
    page_size: options.PageSize = None,
    cache: options.Cache = None,
    evict: options.Evict = None,
    chunk: options.Chunk = None,
    chunk_depth: options.ChunkDepth = None,
    max_prefill_tokens: options.MaxPrefillTokens = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    max_running: options.MaxRunning = None,
    mixed_chunk: options.MixedChunk = None,
    preempt_threshold: options.PreemptThreshold = None,
    conservativeness: options.Conservativeness = None,
    max_passed_over: options.MaxPassedOver = None,
    max_prefill_streak: options.MaxPrefillStreak = None,
    queue_timeout: options.QueueTimeout = None,
    request_timeout: options.RequestTimeout = None,
    overlap: options.Overlap = None,
    overlap_prefills: options.OverlapPrefills = None,
    ignore_eos: options.IgnoreEos = None,
    max_tokens: options.MaxTokens = None,
) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP API."""
    flags = dict(locals())
    server = {
        name: flags.pop(name)
        for name in (
            "backend",
            "host",
            "port",
            "api_key",
            "trust_request_chat_template",
            "profile_dir",
            "weights_dir",
            "served_model_name",
            "tokenizer",
            "load_format",
            "max_queue",
            "max_body_bytes",
            "record",
            "record_content",
            "time_scale",
            "simulated_output_tokens",
        )
    }
    for name in ("allow_origin", "allow_host"):
        server[name] = tuple(flags.pop(name) or ())
    server["stuck_after_s"] = flags.pop("stuck_after")
    server["drain_timeout_s"] = flags.pop("drain_timeout")
    del flags["force"], flags["config"]
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        code = _run(config, flags, server, force)
    raise typer.Exit(code)


def _run(config: Path | None, flags: dict[str, Any], server: dict[str, Any], force: bool) -> int:
    from workbench.cli.runs import command_line, say
    from workbench.scheduler.config import ConfigError
    from workbench.settings.idle import check_effects
    from workbench.settings.loading import settings_from
    from workbench.settings.real import check_device_effects, choose_device, device_defaults, runner_options

    try:
        from workbench.serving.serve_settings import ServeSettings
        from workbench.serving.supervisor import serve as run_server

        real = server["backend"] in ("auto", "cpu", "cuda")
        if real:
            server["backend"] = choose_device(server["backend"])
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs the package {error.name!r}: pip install 'llm-workbench[live]'") from error
    if force and server["record"] is None:
        raise ConfigError("force: there is no --record whose folder could be replaced")
    defaults: dict[str, Any] = {}
    if real:
        say(check_device_effects(flags, config, server["backend"]))
        defaults = device_defaults(server["backend"])
    run = settings_from(config, flags, defaults=defaults)
    say(check_effects(run, flags, config))
    settings = ServeSettings(run, command=command_line(), **server)
    if real:  # what the runner does not do is refused before anything is loaded
        runner_options(settings.run, settings.loop, settings.backend, settings.load_format)
    return run_server(settings, force)
