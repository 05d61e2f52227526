"""What HTTP costs: output tokens/s of 64 streams through ``quire serve`` beside the offline engine's, and the front's CPU time.

    python benchmarks/http_cost.py [MODEL] [--streams 64] [--prompt 128] [--tokens 256] [--rounds 3] [--json FILE]

Both get the same prompts (random token ids, seed 0) and generate --tokens tokens each, greedily; a fresh process for each run, taking
turns. Speed is counted from the moment the requests are there to the last token. The client is one process that writes the requests
and throws away what comes back; it shares the cores with the server, so that its own CPU time is told too. "front" is the CPU time
of the server's HTTP process between the first request and the last byte, by token that was streamed. What the requests themselves cost
(connection, parsing, checks, the first and the last event) is measured with streams of one token, and told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from statistics import median

from serving_process import serving

TICKS = os.sysconf("SC_CLK_TCK")
REQUEST_ROUNDS = 4


def prompts(args: argparse.Namespace) -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(10, args.vocab) for _ in range(args.prompt)] for _ in range(args.streams)]


def offline(args: argparse.Namespace) -> float:
    """Output tokens/s, in a process of its own."""
    command = [sys.executable, __file__, args.model, "--offline", *(f"--{n}={getattr(args, n)}" for n in NUMBERS)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def run_offline(args: argparse.Namespace) -> None:
    from quire import LLM, SamplingParams
    from quire.llm import TokensPrompt

    llm = LLM(args.model, max_num_seqs=args.streams)
    llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    todo: list[str | TokensPrompt] = [{"prompt_token_ids": prompt} for prompt in prompts(args)]
    start = time.perf_counter()
    done = llm.generate(todo, SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True), use_tqdm=False)
    seconds = time.perf_counter() - start
    print(sum(len(output.outputs[0].token_ids) for output in done) / seconds)


def cpu_times(pid: int) -> tuple[float, float]:
    """Seconds: user, system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / TICKS, int(fields[12]) / TICKS


def served(args: argparse.Namespace) -> dict[str, float]:
    """Output tokens/s; microseconds of CPU for each token: the front's user and system time, what of both are the requests, the
    client's."""
    with serving(args.model, "--max-num-seqs", str(args.streams)) as server:
        pid, tokens = server.process.pid, args.streams * args.tokens

        def cpu_of(length: int, times: int = 1) -> tuple[float, float]:
            before = cpu_times(pid)
            for _ in range(times):
                stream_all(server.port, prompts(args), length)
            after = cpu_times(pid)
            return (after[0] - before[0]) / times, (after[1] - before[1]) / times

        stream_all(server.port, [[1, 2, 3]], 2)
        own, start = time.process_time(), time.perf_counter()
        user, system = cpu_of(args.tokens)
        seconds, own = time.perf_counter() - start, time.process_time() - own
        requests = sum(cpu_of(1, REQUEST_ROUNDS))  # the prompts are cached by now
    made = {"front_us": user + system, "user_us": user, "system_us": system, "requests_us": requests, "client_us": own}
    return {"http": tokens / seconds} | {name: value / tokens * 1e6 for name, value in made.items()}


def stream_all(port: int, all_prompts: list[list[int]], tokens: int) -> None:
    """Stream the completions of all prompts at once, until each has ended. Raises RuntimeError where one did not end well."""
    poll = selectors.DefaultSelector()
    for prompt in all_prompts:
        body = json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}).encode()
        connection = socket.create_connection(("127.0.0.1", port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        poll.register(connection, selectors.EVENT_READ, bytearray())
    while poll.get_map():
        for key, _ in poll.select():
            assert isinstance(key.fileobj, socket.socket)
            connection, tail = key.fileobj, key.data
            data = connection.recv(1 << 16)
            tail[:] = (tail + data)[-200:]
            if not data or data.endswith(b"0\r\n\r\n"):
                if b"[DONE]" not in tail or b"error" in tail:
                    raise RuntimeError(f"a stream ended with {bytes(tail)!r}")
                poll.unregister(connection)
                connection.close()


NUMBERS = ("streams", "prompt", "tokens", "vocab")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=1000, help="token ids are drawn below this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offline:
        run_offline(args)
        return
    rounds = []
    for number in range(args.rounds):
        alone, one = offline(args), served(args)
        rounds.append({"offline": alone, "ratio": one["http"] / alone} | one)
        print(
            f"round {number + 1}: offline {alone:,.0f} tokens/s, HTTP {one['http']:,.0f} ({one['http'] / alone:.1%}), "
            f"front {one['front_us']:.1f} µs a token (user {one['user_us']:.1f}, system {one['system_us']:.1f}; "
            f"{one['requests_us']:.1f} of it are the requests), client {one['client_us']:.1f} µs",
            flush=True,
        )
    middle = {name: median(r[name] for r in rounds) for name in rounds[0]}
    print(
        f"median: HTTP / offline {middle['ratio']:.1%}, front {middle['front_us']:.1f} µs of CPU a token, "
        f"{middle['requests_us']:.1f} of it are the requests"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"model": args.model, "rounds": rounds, "median": middle}, indent=1))


if __name__ == "__main__":
    main()
