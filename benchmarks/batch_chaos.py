"""A batch behind a server whose processes are killed, again and again, at random moments: is every line answered exactly once?

    python benchmarks/batch_chaos.py --lines 2000 --kills 10

Each kill ends the front, or the engine and then the front, or both at once, with SIGKILL; then the server is started again on the same
folder. At the end the results are compared with the input, line by line, and with those of a second run that nobody disturbs (seeded
lines give the same bytes).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from serving_process import ServeProcess

HOW = ("front", "engine, then front", "both")
client = httpx.Client(timeout=120.0)


def serve(folder: Path, arguments: list[str]) -> ServeProcess:
    return ServeProcess("--batch-dir", str(folder), *arguments)


def kill(server: ServeProcess, how: str, rng: random.Random) -> None:
    engine = server.engine_pid() if how != "front" else None
    if engine is not None:
        os.kill(engine, signal.SIGKILL)
    if how == "engine, then front":
        time.sleep(rng.uniform(0, 2))
    server.process.kill()
    server.process.communicate()


def counts(server: ServeProcess, batch: str) -> dict[str, Any]:
    value: dict[str, Any] = client.get(f"{server.url}/v1/batches/{batch}").json()
    return value


def submit(server: ServeProcess, content: bytes) -> str:
    file = client.post(f"{server.url}/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    return str(client.post(f"{server.url}/v1/batches", json=body).json()["id"])


def finish(server: ServeProcess, batch: str) -> list[Any]:
    while (now := counts(server, batch))["status"] not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.2)
    if now["status"] != "completed":
        raise SystemExit(f"the batch ended as {now}")
    found = []
    for file in filter(None, (now["output_file_id"], now["error_file_id"])):
        found += [json.loads(line) for line in client.get(f"{server.url}/v1/files/{file}/content").text.splitlines()]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=20, help="of each line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calm", action="store_true", help="compare with a run that nobody disturbs")
    args, arguments = parser.parse_known_args()
    rng = random.Random(args.seed)
    bodies = [{"prompt": f"def f{i}(", "max_tokens": args.tokens, "seed": i, "ignore_eos": True} for i in range(args.lines)]
    lines = [{"custom_id": f"id-{i}", "method": "POST", "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        server = serve(folder, arguments)
        batch = submit(server, content)
        for number in range(args.kills):
            # Somewhere in the next part of the batch, so that every kill meets it at work.
            goal = args.lines * (number + rng.random()) / (args.kills + 1)
            while (now := counts(server, batch)["request_counts"]["completed"]) < goal:
                time.sleep(0.02)
            how = rng.choice(HOW)
            kill(server, how, rng)
            print(f"kill {number + 1} ({how}) at {now:,} of {args.lines:,} answers, {time.monotonic() - started:.1f} s", flush=True)
            server = serve(folder, arguments)
        found = finish(server, batch)
        ids = Counter(each["custom_id"] for each in found)
        lost, doubled = [line["custom_id"] for line in lines if line["custom_id"] not in ids], [i for i, n in ids.items() if n > 1]
        ordered = [each["custom_id"] for each in found] == [line["custom_id"] for line in lines]
        wrong = sum(each["response"]["status_code"] != 200 for each in found)
        print(f"{args.lines:,} lines, {args.kills} kills, {time.monotonic() - started:.1f} s: {len(lost)} lost, {len(doubled)} doubled, "
              f"{wrong} failed, {'in' if ordered else 'NOT in'} the order of the input")  # fmt: skip
        changed = 0
        if args.calm:
            calm = finish(server, submit(server, content))
            texts = [[each["response"]["body"]["choices"] for each in run] for run in (found, calm)]
            changed = sum(a != b for a, b in zip(*texts, strict=True))
            print(f"{changed} with other bytes than in a run that nobody disturbed")
        server.stop()
    return 1 if lost or doubled or wrong or changed or not ordered else 0


if __name__ == "__main__":
    sys.exit(main())
