"""Engines killed and stopped under many streams: nothing may be lost, doubled or changed.

    python benchmarks/chaos.py [--streams 300] [--kills 20] [--stops 2] [--seed 0]

The same calls (greedy, seeded, unseeded, several samples, beams, chat, structured output; streamed and whole) are made twice: undisturbed,
and while the engine is killed (SIGKILL) and stopped (SIGSTOP) at random moments. Every call must end as it did before, byte for
byte, log-probabilities included. A call without a seed is one of its own: it must end, once, with as many tokens as it asked for and
text that is that of its tokens. Recovery is the time from a kill to the next token of anybody.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from serving_process import ServeProcess, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENGINE_TIMEOUT_S = 6
MAX_RECOVERY_S = 3.0
"""From a kill to the next token, on the embedded model."""
PROMPTS = ("import os\n", "def f(x):\n", "class A:\n", "for i in range(", "x = [", "return ", "# Sort a list\n", "while True:\n")
KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("greedy", COMPLETIONS, {"temperature": 0, "stream": True}),
    ("seeded", COMPLETIONS, {"seed": 1, "stream": True, "logprobs": 2}),
    ("unseeded", COMPLETIONS, {"stream": True}),
    ("whole", COMPLETIONS, {"seed": 2, "logprobs": 1}),
    ("samples", COMPLETIONS, {"seed": 3, "n": 3, "stream": True}),
    ("best of", COMPLETIONS, {"seed": 4, "best_of": 3}),
    ("beams", COMPLETIONS, {"beam_width": 3, "n": 2}),
    ("chat", CHAT, {"seed": 5, "stream": True}),
    ("structured", COMPLETIONS, {"seed": 6, "stream": True, "structured_outputs": {"regex": "[a-z ]{40,400}"}}),
    ("penalties", COMPLETIONS, {"seed": 7, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "stream": True}),
)


@dataclass(slots=True)
class Call:
    """One call, and what its client is told that may not depend on how often the engine died."""

    kind: str
    path: str
    body: dict[str, Any]
    status: str = ""
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)

    def run(self, url: str, clock: Clock) -> Call:
        made = Call(self.kind, self.path, self.body)
        request = urllib.request.Request(url + self.path, json.dumps(self.body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                if not self.body.get("stream"):
                    made._take(json.load(answer), clock)
                    made.status = "done"
                    return made
                for line in answer:
                    if line == b"data: [DONE]\n":
                        made.status += "done"
                    elif line.startswith(b"data: "):
                        made._take(json.loads(line[6:]), clock)
        except OSError as e:
            made.status = f"failed: {e}"
        return made

    def _take(self, event: dict[str, Any], clock: Clock) -> None:
        if "error" in event:
            self.status = event["error"]["message"]
            return
        for choice in event["choices"]:
            said = self.choices.setdefault(choice["index"], {"text": "", "tokens": [], "ends": [], "logprobs": []})
            message = choice.get("delta") or choice.get("message") or {}
            said["text"] += choice["text"] if "text" in choice else message.get("content") or ""
            said["tokens"] += choice.get("token_ids") or []
            if choice.get("logprobs"):
                said["logprobs"].append(choice["logprobs"]["token_logprobs"])
            if choice["finish_reason"]:
                said["ends"].append(choice["finish_reason"])
            if choice.get("token_ids"):
                clock.token()

    @property
    def told(self) -> Any:
        return self.status, {
            index: (said["text"], said["tokens"], said["ends"], [value for part in said["logprobs"] for value in part])
            for index, said in self.choices.items()
        }


class Clock:
    """When the last token came, and how long after a kill the first one did."""

    def __init__(self) -> None:
        self.recoveries: list[float] = []
        self._killed: float | None = None
        self._lock = threading.Lock()

    def kill(self) -> None:
        with self._lock:
            self._killed = time.monotonic()

    def token(self) -> None:
        if self._killed is not None:
            with self._lock:
                if self._killed is not None:
                    self.recoveries.append(time.monotonic() - self._killed)
                    self._killed = None

    @property
    def waits(self) -> bool:
        return self._killed is not None


def calls(count: int) -> list[Call]:
    made = []
    for i in range(count):
        kind, path, fields = KINDS[i % len(KINDS)]
        prompt, tokens = PROMPTS[i // len(KINDS) % len(PROMPTS)] + f"# {i}\n", 60 + 37 * i % 240
        body = {"max_tokens": tokens, "ignore_eos": kind != "structured", "return_token_ids": True} | fields
        body |= {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
        if "seed" in body:
            body["seed"] += 1000 * i
        made.append(Call(kind, path, body))
    return made


def run(server: ServeProcess, asked: list[Call], clock: Clock) -> list[Call]:
    with ThreadPoolExecutor(len(asked)) as clients:
        return list(clients.map(lambda call: call.run(server.url, clock), asked))


def disturb(server: ServeProcess, how: list[str], rng: random.Random, clock: Clock, over: threading.Event) -> list[str]:
    """Kill or stop the engine, in the order of ``how``, each time after a token has come. What was done."""
    done = []
    for what in how:
        if over.wait(rng.uniform(0.1, 0.8)):
            break
        pid = server.engine_pid()
        if pid is None:
            continue
        os.kill(pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        if what == "kill":
            clock.kill()
        done.append(what)
        while not over.is_set() and (clock.waits or server.engine_pid() in (pid, None) or server.get("/ready")[0] != 200):
            time.sleep(0.02)
    return done


def wrong_with(before: Call, after: Call) -> str | None:
    if before.kind != "unseeded":
        return None if after.told == before.told else f"changed: {before.told!r:.300} became {after.told!r:.300}"
    if after.status != "done":
        return f"lost: {after.status}"
    said = after.choices.get(0)
    if said is None or said["ends"] != ["length"] or len(said["tokens"]) != after.body["max_tokens"]:
        return f"lost or doubled: {said!r:.300}"
    return None


def detokenized(server: ServeProcess, call: Call) -> bool:
    """The text of a call without a seed is that of its tokens."""
    body = json.dumps({"tokens": call.choices[0]["tokens"]}).encode()
    request = urllib.request.Request(server.url + "/detokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = json.load(answer)["prompt"]
    return bool(text.replace("<|endoftext|>", "") == call.choices[0]["text"])


def chaos(server: ServeProcess, streams: int, kills: int, stops: int, seed: int) -> tuple[list[str], dict[str, Any]]:
    """What is wrong, and the figures."""
    asked, clock, rng = calls(streams), Clock(), random.Random(seed)
    undisturbed = run(server, asked, Clock())
    how = ["kill"] * kills + ["stop"] * stops
    rng.shuffle(how)
    over, done, rounds = threading.Event(), [], 0
    disturbed: list[list[Call]] = []
    with ThreadPoolExecutor(1) as side:
        task = side.submit(disturb, server, how, rng, clock, over)
        while not task.done() or not disturbed:  # all of the kills, however long the calls take
            disturbed.append(run(server, asked, clock))
            rounds += 1
        over.set()
        done = task.result()
    wrong = [f"call {i} ({before.kind}): {said}" for after in disturbed for i, before in enumerate(undisturbed)
             if (said := wrong_with(before, after[i])) is not None]  # fmt: skip
    wrong += [f"an undisturbed call did not end: {call.status}" for call in undisturbed if call.status != "done"]
    wrong += ["the text of a call is not that of its tokens" for after in disturbed for call in after
              if call.kind == "unseeded" and call.status == "done" and not detokenized(server, call)]  # fmt: skip
    if not server.wait_clean():
        wrong.append(f"blocks were lost: {server.health()}")
    if (restarts := server.health().get("engine_restarts")) != len(done):
        wrong.append(f"{restarts} engines were started for {len(done)} that were killed or stopped")
    slow = [seconds for seconds in clock.recoveries if seconds > MAX_RECOVERY_S]
    wrong += [f"the next token came {seconds:.2f} s after a kill" for seconds in slow]
    return wrong, {
        "streams": streams * rounds, "kills": done.count("kill"), "stops": done.count("stop"),
        "wrong": len(wrong), "recoveries": clock.recoveries,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with serving("--kv-memory", "256MiB", "--engine-timeout", str(ENGINE_TIMEOUT_S)) as server:
        wrong, figures = chaos(server, args.streams, args.kills, args.stops, args.seed)
    recoveries = sorted(figures.pop("recoveries"))
    for name, value in figures.items():
        print(f"  {name:10} {value:8,}")
    if recoveries:
        print(f"  next token after a kill: median {statistics.median(recoveries):.2f} s, at most {recoveries[-1]:.2f} s")
    for line in wrong[:50]:
        print(f"WRONG: {line}")
    print("0 lost, 0 doubled, 0 changed" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
