"""Many connections for a long time, some of which hang up: memory of both processes stays flat, and blocks come back.

    python benchmarks/soak.py [--connections 1000] [--minutes 10] [--hang-ups 0.1] [--seed 0]

Each connection asks for one stream after the other; one in ten hangs up at a random moment of it, and connects again. Memory is
read every few seconds; it may not grow by more than --growth MiB from the end of the first third to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from serving_process import ServeProcess, serving

HEAD = "POST /v1/completions HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"


async def client(port: int, rng: random.Random, hang_ups: float, until: float, counts: Counter[str]) -> None:
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            counts["refused"] += 1
            await asyncio.sleep(0.1)
            continue
        try:
            while time.monotonic() < until:
                leaves = rng.random() < hang_ups
                try:
                    counts[await stream(reader, writer, rng, leaves)] += 1
                except (OSError, EOFError):
                    counts["broken"] += 1
                    break
                if leaves:
                    break
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random, leaves: bool) -> str:
    """One request, up to its end or to where the client leaves. What became of it."""
    prompt = "x = 1\n" * rng.randint(1, 30) + f"# {rng.randint(0, 50)}\n"
    body = json.dumps({"prompt": prompt, "max_tokens": rng.randint(1, 60), "stream": True, "n": rng.choice((1, 1, 1, 2))})
    writer.write((HEAD.format(len(body)) + body).encode())
    await writer.drain()
    if leaves and rng.random() < 0.3:
        await asyncio.sleep(rng.uniform(0, 0.5))  # while it waits, perhaps
        return "left"
    status = (await reader.readuntil(b"\r\n\r\n"))[9:12]
    if status != b"200":
        await reader.readuntil(b"}}")
        return f"status {status.decode()}"
    events, most = 0, rng.randint(1, 30)
    while True:
        line = await reader.readuntil(b"\n")
        if b"[DONE]" in line:
            await reader.readuntil(b"0\r\n\r\n")
            return "done"
        events += line.startswith(b"data: ")
        if leaves and events >= most:
            return "left"


async def soak(
    server: ServeProcess, connections: int, seconds: float, hang_ups: float, seed: int
) -> tuple[Counter[str], list[dict[str, float]]]:
    """What became of the requests, and the memory over the time."""
    counts: Counter[str] = Counter()
    until = time.monotonic() + seconds
    clients = [
        asyncio.create_task(client(server.port, random.Random(seed * 10_007 + i), hang_ups, until, counts)) for i in range(connections)
    ]
    memory: list[dict[str, float]] = []
    while time.monotonic() < until:
        await asyncio.sleep(min(seconds / 40, 5))
        memory.append(server.memory())
    await asyncio.gather(*clients)
    memory.append(server.memory())
    return counts, memory


def check(server: ServeProcess, counts: Counter[str], memory: list[dict[str, float]], growth_mib: float) -> list[str]:
    wrong = []
    if not server.wait_clean():
        wrong.append(f"blocks were lost: {server.health()}")
    if server.health().get("engine_restarts") != 0:
        wrong.append("the engine was started again")
    if not server.wait(lambda: server.health().get("kv_blocks_used") == 0 and open_sockets(server) < 10, 30):
        wrong.append(f"{open_sockets(server)} sockets are still open")
    wrong += [f"{n:,} requests: {what}" for what, n in counts.items() if what not in ("done", "left", "status 429")]
    settled = memory[len(memory) // 3 :]
    growth = {name: settled[-1][name] - first for name, first in settled[0].items()}
    return wrong + [f"{name} grew by {mib:.1f} MiB in the last two thirds" for name, mib in growth.items() if mib > growth_mib]


def open_sockets(server: ServeProcess) -> int:
    """Of the front."""
    found = 0
    for entry in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(entry.readlink()).startswith("socket:")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--hang-ups", type=float, default=0.1)
    parser.add_argument("--growth", type=float, default=16, help="MiB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with serving("--kv-memory", "64MiB") as server:
        counts, memory = asyncio.run(soak(server, args.connections, 60 * args.minutes, args.hang_ups, args.seed))
        wrong = check(server, counts, memory, args.growth)
    print("  " + "  ".join(f"{what}: {n:,}" for what, n in counts.most_common()))
    print(f"  {'MiB after':>12}" + "".join(f"{part:>9}" for part in ("1/3", "2/3", "the end", "most")))
    for name in memory[0]:
        values = [sample[name] for sample in memory]
        print(
            f"  {name:>12}"
            + "".join(f"{v:9.1f}" for v in (values[len(values) // 3], values[2 * len(values) // 3], values[-1], max(values)))
        )
    for line in wrong:
        print(f"WRONG: {line}")
    print("memory is flat, no block is lost" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
