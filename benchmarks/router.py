"""What a router costs: seconds to the first token and streamed tokens a second, direct, through `workbench route`, nginx.

    .venv/bin/python benchmarks/router.py [--streams 200] [--rounds 5] [--over 0] [--tokens 64] [--time-scale 1]

Bursts of streams go the three ways in turns, round by round, to the same two simulated servers; what is added is compared
round by round. Without nginx there is no third way.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.token_streams import MODEL, Stream, started, stream

NGINX = """daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream workers {{ {servers} keepalive 256; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://workers; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host localhost;
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""


async def burst(urls: list[str], prompts: list[str], tokens: int, over_s: float = 0.0) -> tuple[np.ndarray, float]:
    """All prompts, begun evenly over so many seconds, in turns to these addresses: seconds to each first token, and tokens a
    second of them all."""
    began_s = time.perf_counter()

    async def one(number: int, prompt: str) -> Stream:
        await asyncio.sleep(over_s * number / len(prompts))
        return await stream(urls[number % len(urls)], {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True})

    streams = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    took_s = time.perf_counter() - began_s
    return np.array([s.at_s[0] - s.sent_s for s in streams]), len(prompts) * tokens / took_s


def with_nginx(folder: Path, urls: list[str], port: int) -> subprocess.Popen[bytes]:
    """nginx in front of the same servers, in turns."""
    servers = " ".join(f"server {urlsplit(url).netloc};" for url in urls)
    (folder / "conf").write_text(NGINX.format(folder=folder, servers=servers, port=port))
    return subprocess.Popen(["nginx", "-c", str(folder / "conf"), "-e", str(folder / "error.log")])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--over", type=float, default=0.0, help="seconds over which the streams begin")
    parser.add_argument("--time-scale", default="1")
    parser.add_argument("--router", default="round_robin")
    given = parser.parse_args()
    running: list[subprocess.Popen[str] | subprocess.Popen[bytes]] = []
    folder = Path(tempfile.mkdtemp(prefix="workbench-router-"))
    try:
        urls = []
        for _ in range(2):
            serve = ("serve", MODEL, "--backend", "simulated", "--port", "0", "--time-scale", given.time_scale)
            process, url = started(*serve, "--max-queue", "100000")
            running.append(process)
            urls.append(url)
        words = [word for url in urls for word in ("--worker", url)]
        process, routed = started("route", "--port", "0", "--router", given.router, *words)
        running.append(process)
        ways = {"direct": urls, "workbench route": [routed]}
        if shutil.which("nginx"):
            port = free_port()
            running.append(with_nginx(folder, urls, port))
            ways["nginx"] = [f"http://127.0.0.1:{port}"]
            time.sleep(0.5)
        report(ways, given)
    finally:
        for each in running:
            each.send_signal(signal.SIGTERM)
        for each in running:
            each.wait()
        shutil.rmtree(folder, ignore_errors=True)


def report(ways: dict[str, list[str]], given: argparse.Namespace) -> None:
    """Go every way in every round, and print what each costs."""
    first_s: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(given.rounds + 1):
        names = list(ways) if number % 2 else list(ways)[::-1]
        prompts = [f"round {number} stream {stream} " * 8 for stream in range(given.streams)]
        for way in names:
            # Its own prompts, so that none finds in a prefix cache what another way has left there.
            took_s, rate = asyncio.run(
                burst(ways[way], [f"{way} {prompt}" for prompt in prompts], given.tokens, given.over)
            )
            if number:  # the first warms up
                first_s[way].append(took_s)
                rates[way].append(rate)
    begun = f"begun over {given.over:g} s" if given.over else "at once"
    print(
        f"{given.streams} streams {begun} of {given.tokens} tokens, {given.rounds} rounds, time scale {given.time_scale}"
    )
    for way in ways:
        mine = np.concatenate(first_s[way])
        p50, p99 = np.percentile(mine, (50, 99)) * 1e3
        line = f"{way:16} TTFT p50 {p50:7.1f} ms, p99 {p99:7.1f} ms; {np.median(rates[way]):8,.0f} tokens/s"
        if way != "direct":
            pairs = list(zip(first_s[way], first_s["direct"], strict=True))
            p50, p99 = (
                np.median([np.percentile(a, q) - np.percentile(b, q) for a, b in pairs]) * 1e3 for q in (50, 99)
            )
            line += f"; added: p50 {p50:+.1f} ms, p99 {p99:+.1f} ms"
        print(line)


if __name__ == "__main__":
    main()
