"""`workbench simulate` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from reports.record.run_record import RecordError, read_meta, read_record
from tests.meta_form import check_meta

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "traces" / "samples" / "sample.jsonl"
SHARED = ROOT.parent / "shared" / "data" / "traces"
RECORD = ("requests.csv", "iterations.csv", "itl.csv")


def workbench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from workbench.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def run(out: Path, *arguments: object) -> dict[str, dict]:
    """Simulate, and return the numbers of each loop."""
    done = workbench("simulate", *arguments, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return {name: each["metrics"] for name, each in json.loads(done.stdout)["runs"].items()}


def test_three_loops_on_the_same_gpus_leave_records_and_a_page(tmp_path):
    numbers = run(
        tmp_path / "o", SAMPLE, "--loop", "normal,overlap,pipeline", "--tp", 2, "--requests", 60, "--decisions"
    )
    assert list(numbers) == ["normal", "overlap", "pipeline"]
    for loop, metrics in numbers.items():
        assert metrics["requests_finished"] == 60
        for file in (*RECORD, "meta.json", "decisions.jsonl"):
            assert (tmp_path / "o" / loop / file).stat().st_size > 0
        meta = read_meta(tmp_path / "o" / loop)
        check_meta(meta, "simulated")
        assert meta["hardware"]["gpus"] == 2
    assert numbers["overlap"]["tpot_mean_s"] < numbers["normal"]["tpot_mean_s"]
    assert numbers["overlap"]["cpu_exposed_share"] < numbers["normal"]["cpu_exposed_share"]
    assert "<html" in (tmp_path / "o" / "report.html").read_text()


def test_the_terminal_says_what_the_weights_are_held_in_once_and_as_no_note(tmp_path):
    done = workbench("simulate", SAMPLE, "--loop", "normal,overlap", "--requests", 3, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "weights" in line] == ["weights: bf16 (from torch_dtype)"]
    assert [line for line in lines if line.startswith("note: ")] == ["note: only the first 3 requests"]


@pytest.mark.slow
def test_the_same_command_twice_writes_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        run(tmp_path / name, SAMPLE, "--requests", 80, "--policy", "random", "--seed", 7)
    for file in RECORD:
        assert (tmp_path / "one/overlap" / file).read_bytes() == (tmp_path / "two/overlap" / file).read_bytes()


def test_printed_numbers_are_those_of_the_csv_files(tmp_path):
    metrics = run(tmp_path / "o", SAMPLE, "--requests", 100)["overlap"]
    requests = pd.read_csv(tmp_path / "o/overlap/requests.csv")
    assert metrics["ttft_mean_s"] == pytest.approx((requests.first_token_s - requests.arrival_s).mean(), rel=1e-9)
    assert metrics["e2e_p99_s"] == pytest.approx((requests.finish_s - requests.arrival_s).quantile(0.99), rel=1e-9)


def test_overlap_hides_no_more_than_the_cpu_time_of_normal(tmp_path):
    run(tmp_path / "o", SAMPLE, "--loop", "normal,overlap", "--requests", 100, "--ignore-eos", "--concurrency", 16)
    ends = {}
    cpu_s = 0.0
    for loop in ("normal", "overlap"):
        steps = pd.read_csv(tmp_path / "o" / loop / "iterations.csv")
        ends[loop] = steps.end_s.max()
        if loop == "normal":
            cpu_s = steps[["receive_s", "schedule_s", "launch_host_s", "process_s"]].to_numpy().sum()
    assert 0 < ends["normal"] - ends["overlap"] <= cpu_s


@pytest.mark.slow
def test_known_lengths_waste_no_slot_and_unknown_ones_do_under_overlap(tmp_path):
    tokens = {}
    for name, flags in (("known", ["--ignore-eos"]), ("unknown", [])):
        run(tmp_path / name, SAMPLE, "--requests", 60, *flags)
        steps = pd.read_csv(tmp_path / name / "overlap" / "iterations.csv")
        requests = pd.read_csv(tmp_path / name / "overlap" / "requests.csv")
        tokens[name] = steps.decode_tokens.sum() - (requests.output_tokens - 1).sum()
    assert tokens["known"] == 0
    assert 0 < tokens["unknown"] <= 60


def test_an_idle_server_answers_in_prefill_time_plus_cpu_phases(tmp_path):
    trace = tmp_path / "slow.jsonl"
    lines = [{"arrival_s": 100.0 * i, "input_length": 500, "output_length": 2} for i in range(3)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(tmp_path / "o", trace, "--loop", "normal", "--cache", "none")
    requests = pd.read_csv(tmp_path / "o/normal/requests.csv")
    steps = pd.read_csv(tmp_path / "o/normal/iterations.csv")
    prefills = steps[steps["mode"] == "prefill"]
    assert len(prefills) == 3
    ttft = (requests.first_token_s - requests.arrival_s).to_numpy()
    cpu = prefills[["receive_s", "schedule_s", "launch_host_s", "process_s"]].sum(axis=1).to_numpy()
    gpu = (prefills.end_s - prefills.start_s).to_numpy()
    # The kernels of an eager prefill are issued while the first of them run: launch and GPU time overlap in part.
    assert (ttft < gpu + cpu + 1e-9).all()
    assert (ttft > gpu + prefills[["receive_s", "schedule_s", "process_s"]].sum(axis=1).to_numpy() - 1e-9).all()


@pytest.mark.slow
def test_data_parallel_routers_use_every_instance(tmp_path):
    for router in ("round_robin", "least_requests", "least_tokens", "cache_aware"):
        run(tmp_path / router, SAMPLE, "--dp", 2, "--router", router, "--requests", 80)
        requests = pd.read_csv(tmp_path / router / "overlap" / "requests.csv")
        assert set(requests.instance) == {0, 1}


def test_a_config_file_sets_what_flags_do_not(tmp_path):
    (tmp_path / "run.toml").write_text('model = "Qwen/Qwen3-8B"\nmax-running = 8\nchunk = 512\n')
    done = workbench(
        "simulate", SAMPLE, "--requests", 20, "--config", tmp_path / "run.toml", "--chunk", 256, "--out", tmp_path / "o"
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "o/overlap/meta.json").read_text())["settings"]
    assert (settings["model"], settings["max_running"], settings["chunk"]) == ("Qwen/Qwen3-8B", 8, 256)


def test_ctrl_c_keeps_and_reports_what_was_simulated(tmp_path):
    code = """
import signal
from workbench.cli.main import main
from workbench.recording.recorder import Recorder

arrived, number = Recorder.arrived, 0

def arrived_and_ctrl_c(*request):
    global number
    number += 1
    if number == 50:
        signal.raise_signal(signal.SIGINT)
    arrived(*request)

Recorder.arrived = arrived_and_ctrl_c
main()
"""
    words = ["simulate", str(SAMPLE), "--loop", "normal,overlap", "--out", "o", "--decisions"]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    err = done.stderr
    assert done.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    meta = json.loads((tmp_path / "o/normal/meta.json").read_text())
    assert meta["interrupted"] and meta["totals"]["ended"] > 0
    assert (tmp_path / "o/report.html").exists()


@pytest.mark.slow
def test_chunk_0_computes_prompts_whole_and_a_run_like_that_one_does_too(tmp_path):
    trace = tmp_path / "long.jsonl"
    trace.write_text('{"arrival_s": 0.0, "input_length": 9000, "output_length": 3}\n')
    in_chunks = workbench("simulate", trace, "--out", tmp_path / "chunks")
    whole = workbench("simulate", trace, "--chunk", 0, "--out", tmp_path / "whole")
    alike = workbench("simulate", trace, "--like", tmp_path / "whole/overlap", "--out", tmp_path / "alike")
    assert [done.returncode for done in (in_chunks, whole, alike)] == [0, 0, 0], whole.stderr + alike.stderr
    chunks = [
        read_record(tmp_path / name / "overlap").iterations["prefill_tokens"][:2].tolist()
        for name in ("chunks", "whole", "alike")
    ]
    assert chunks == [[8192, 808], [9000, 0], [9000, 0]]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nope.jsonl"], "error: nope.jsonl: no such file"),
        ([SAMPLE, "--gpu", "h1000"], "error: unknown GPU 'h1000'; nearest: h100, v100, h800 (or a TOML file)"),
        ([SAMPLE, "--model", "Llama-3.1-9B"], "error: unknown model 'Llama-3.1-9B'; nearest: "),
        ([SAMPLE, "--model", "Llama-3.1-70B"], "error: meta-llama/Llama-3.1-70B in bf16 does not fit h100 with "),
        ([SAMPLE, "--loop", "foo"], "error: loop: 'foo' is not one of normal, overlap, pipeline"),
        ([SAMPLE, "--chunk", 0, "--chunk-depth", 2000], "error: chunk_depth: needs a chunk size"),
        ([SAMPLE, "--micro-batches", 2], "error: micro_batches: only the pipeline loop has them"),
        ([SAMPLE, "--pp", 4, "--micro-batches", 3], "error: micro_batches: 3 leaves some of the 4 stages without work"),
        ([SAMPLE, "--policy", "nosuch:Thing"], "error: policy: cannot load 'nosuch:Thing': No module named 'nosuch'"),
        ([SAMPLE, "--page-size", "0"], "error: page_size: 0 is less than 1"),
        ([SAMPLE, "--dp", 10**20], f"error: dp: {10**20} is more than 10000 instances"),
        (
            [SAMPLE, "--kv-tokens", "500"],
            "error: 400 of 400 requests can never be served under overlap: s0.0 with 785 "
            "input tokens is prompt_exceeds_kv (kv_tokens 500, ",
        ),
        ([SAMPLE, "--config", "missing.toml"], "error: missing.toml: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, line, tmp_path):
    done = workbench("simulate", *arguments, "--out", tmp_path / "o")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(line)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_more_clients_than_requests_are_as_many_as_the_requests(tmp_path):
    few, many = (tmp_path / name for name in ("few", "many"))
    for out, clients in ((few, 5), (many, 10**18)):
        done = workbench("simulate", SAMPLE, "--requests", 5, "--concurrency", clients, "--out", out)
        assert done.returncode == 0, done.stderr
    assert (few / "overlap/requests.csv").read_bytes() == (many / "overlap/requests.csv").read_bytes()


def test_a_fault_deep_in_a_trace_names_the_line_and_leaves_no_folder(tmp_path):
    trace = tmp_path / "t.jsonl"
    good = json.dumps({"arrival_s": 0.0, "input_length": 5, "output_length": 3})
    trace.write_text(good + "\n" + good.replace("5", "-5") + "\n")
    done = workbench("simulate", trace, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert (
        done.stderr == f"error: {trace}, line 2, input_length: '-5' is negative; --skip-bad-rows leaves such rows out\n"
    )
    assert not (tmp_path / "o").exists()
    done = workbench("simulate", trace, "--out", tmp_path / "deep/er/o")
    assert done.returncode == 2 and not (tmp_path / "deep").exists()


def test_a_record_that_cannot_be_written_leaves_nothing_half_done(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from workbench.cli.app import app

    def full(record, folder, extra_files=None):
        raise RecordError(f"{folder}: cannot be written: No space left on device")

    monkeypatch.setattr("reports.record.run_record.write_record", full)
    words = ["simulate", str(SAMPLE), "--requests", "5", "--decisions", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert done.stderr.strip().splitlines()[-1].endswith("cannot be written: No space left on device")
    assert not list(tmp_path.glob("o/.*")) and not (tmp_path / "o/overlap").exists()


def test_an_existing_output_folder_is_kept_unless_forced(tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "precious.txt").write_text("mine")
    for flags in ([], ["--force"]):
        done = workbench("simulate", SAMPLE, "--requests", 5, "--out", tmp_path / "o", *flags)
        assert done.returncode == 2
        assert (tmp_path / "o" / "precious.txt").read_text() == "mine"


def test_simulate_imports_neither_torch_nor_transformers():
    code = (
        "import sys; import workbench.cluster.simulate, workbench.cli.simulate, reports.page.report_page;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path):
    readme = (ROOT / "README.md").read_text()
    commands = [line.strip() for line in readme.splitlines() if line.startswith("    workbench ")]
    # Those with capitals for what the reader has are run with real names in tests/live, tests/serving and tests/routing.
    commands = [command for command in commands if not {"TRACE", "MODEL", "URL"} & set(command.split())]
    assert len(commands) >= 10
    for command in commands:
        words = [word.replace("traces/samples", str(SAMPLE.parent)) for word in command.split()[1:]]
        done = subprocess.run(
            [sys.executable, "-c", "from workbench.cli.main import main; main()", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the reference data (../shared/data) is not here")
@pytest.mark.parametrize("name", sorted(path.name for path in SHARED.glob("*.gz")) if SHARED.is_dir() else [])
@pytest.mark.slow
def test_a_slice_of_each_real_trace_runs_to_the_end(name, tmp_path):
    # Token ids of a model's own tokenizer need its vocabulary.
    model = ("--model", "Qwen/Qwen3-8B") if "qwen3" in name else ()
    metrics = run(tmp_path / "o", SHARED / name, "--requests", 60, *model)["overlap"]
    assert metrics["requests_finished"] == metrics["requests_total"] == 60


def test_a_fault_of_the_trace_that_the_simulated_clock_comes_upon_is_one_line(tmp_path):
    trace = tmp_path / "t.jsonl"
    lines = [{"arrival_s": i, "prompt_token_ids": [3, 10**6 * i], "output_length": 2} for i in range(3)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = workbench("simulate", trace, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "t.jsonl, line 2, prompt_token_ids: " in done.stderr.splitlines()[-1]


def test_every_pool_with_a_gpu_file_that_says_a_former_key_gets_a_note(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        "memory_bytes = 8e10\nmemory_bandwidth = 2e12\nbf16_flops = 3e14\nlink_bandwidth = 3e11\nreaches_like = 'h100'\n"
    )
    pools = ("--pool", f"both:1,gpu={mine}", "--pool", "both:1,gpu=h100")
    done = workbench("simulate", SAMPLE, "--requests", 2, *pools, "--out", tmp_path / "o", "--json")
    assert done.returncode == 0, done.stderr
    assert f"note: {mine}: reaches_like: is called efficiency_like now" in done.stderr
