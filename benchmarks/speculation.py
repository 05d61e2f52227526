"""What guessing tokens is worth (--speculation): output tokens/s with and without it, taking turns within a run.

    python benchmarks/speculation.py [MODEL ...] [--rounds 3] [--batch 1 32] [--only edit ...] [--tokens 256] [--json FILE]

The models that are at hand can't edit a file. So the outputs of most workloads are forced: the model computes and samples as
always, then the token is replaced by the text's next one. What speculation sees is what a model that writes this text would give it.

    edit     a Python file in the prompt; the output is the file with a name changed everywhere, and lines left out and put in
    answer   a documentation page in the prompt; the output is another text on the same subject, which quotes some of it
    code     a Python file in the prompt; the output is an unrelated one
    table    records with the same words and random numbers: what looks like a repetition, and goes on differently
    random   random tokens: nothing is ever found
    sampled  not forced: the model goes on with a Python file by itself, at temperature 1

Every run has a fresh engine, no prefix cache, and float16 KV. A request's speed is counted from its first token to its last; a batch's
is the sum of all tokens over the time from the first step that decodes only. "on / off" is the median of the ratios of
neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from quire.backends.cpu.backend import CpuBackend
from quire.backends.cpu.sampler import Sampler
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.plan import StepResult
from quire.core.sequence import Request
from quire.models.weights import resolve_model
from quire.sampling_params import SamplingParams
from quire.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = ("edit", "answer", "code", "table", "random", "sampled")


@dataclass
class Job:
    """One request: its prompt, and what it is made to say (nothing: what the model says)."""

    prompt: list[int]
    output: list[int] | None
    temperature: float = 0.0


class ForcedSampler(Sampler):
    """Samples, and then says what it is told: ``outputs[seed]``, token by token."""

    outputs: dict[int, list[int]]

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int64],
        result: StepResult,
        masks: Sequence[bytes | None] = (),
    ) -> None:
        super().sample(logits, rows, lengths, result, masks)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            start = self._rows.starts[row]
            if start is not None and (output := self.outputs.get(start.seed)) is not None:
                at = int(length) - start.num_prompt
                result.tokens[i] = output[at] if at < len(output) else 0


@dataclass
class Result:
    """Of one workload, model and batch size; medians over the rounds."""

    model: str
    workload: str
    batch: int
    off: float
    """Output tokens/s without speculation."""
    on: float
    ratio: float
    drafted: int
    accepted: int
    output: int
    """Tokens of one run."""


def jobs_of(workload: str, tokenizer: Tokenizer, vocab_size: int, count: int, tokens: int, room: int) -> list[Job]:
    """``count`` different requests whose outputs are ``tokens`` long, with prompts of at most ``room`` tokens."""
    code = sorted((ROOT / "quire" / "core").glob("*.py")) + sorted((ROOT / "quire" / "server").glob("*.py"))
    files = [file for file in code if file.stat().st_size > 12 * tokens]
    jobs = []
    for i in range(count):
        rng = Random(i)
        if workload == "random":
            made = [rng.randrange(vocab_size) for _ in range(2 * tokens)]
            jobs.append(Job(made[:tokens], made[tokens:]))
            continue
        if workload == "table":
            text = "".join(f'{{"name": "{rng.randrange(10**6)}", "size": {rng.randrange(10**4)}}},\n' for _ in range(2 * tokens))
            ids = tokenizer.encode(text)
            jobs.append(Job(ids[:tokens], ids[tokens : 2 * tokens]))
            continue
        if workload == "answer":
            page = tokenizer.encode((ROOT / "docs" / "design.md").read_text(encoding="utf-8")[i * 100 :])
            other = tokenizer.encode((ROOT / "quire" / "core" / "README.md").read_text(encoding="utf-8")[i * 10 :])
            jobs.append(Job(page[:room], other[:tokens]))
            continue
        text = files[i % len(files)].read_text(encoding="utf-8")[(i // len(files)) * 200 :]
        prompt = tokenizer.encode(text)[:room]
        if workload == "edit":
            edited = tokenizer.encode(edit(tokenizer.decode(prompt), rng))
            jobs.append(Job([*prompt, *tokenizer.encode("\n# the same file, edited:\n")[1:]], edited[:tokens]))
        elif workload == "code":
            other = tokenizer.encode(files[(i + 1) % len(files)].read_text(encoding="utf-8")[(i // len(files)) * 200 :])
            jobs.append(Job(prompt, other[:tokens]))
        else:
            jobs.append(Job(prompt, None, 1.0))
    return jobs


def edit(text: str, rng: Random) -> str:
    """One of the commonest names gets another name; of twenty lines one goes, and one comes."""
    names = [name for name in re.findall(r"[a-z_]{4,}", text) if name not in ("self", "import", "from", "return", "class")]
    name = max(sorted(set(names)), key=names.count)
    lines = []
    for line in text.replace(name, "renamed").splitlines():
        chance = rng.random()
        if chance > 0.05:
            lines.append(line)
        if chance > 0.95:
            lines.append(f"    value_{rng.randrange(1000)} = {rng.randrange(1000)}")
    return "\n".join(lines)


def run(backend: CpuBackend, config: EngineConfig, jobs: list[Job], tokens: int) -> tuple[float, Engine]:
    """(output tokens/s while nothing but decoding goes on, the engine)"""
    engine = Engine(backend, config, clock=perf_counter)
    for i, job in enumerate(jobs):
        params = SamplingParams(temperature=job.temperature, max_tokens=tokens, ignore_eos=True)
        engine.add(Request(str(i), job.prompt, params, seed=i))
    while engine.scheduler.waiting or any(seq.num_generated == 0 for seq in engine.scheduler.running):
        engine.step()
    before, start = engine.stats().tokens_sampled, perf_counter()
    while engine.has_work:
        engine.step()
    return (engine.stats().tokens_sampled - before) / (perf_counter() - start), engine


def measure(model: str, backend: CpuBackend, config: EngineConfig, workload: str, batch: int, tokens: int, rounds: int) -> Result:
    tokenizer = Tokenizer.load(resolve_model(model))
    assert tokenizer is not None, "the workloads are texts"
    jobs = jobs_of(workload, tokenizer, backend.spec.vocab_size, batch, tokens, backend.max_model_len - tokens - 20)
    assert all(job.output is None or len(job.output) == tokens for job in jobs), "a text is too short for --tokens"
    sampler = ForcedSampler(backend._rows, backend.spec.vocab_size)
    sampler.outputs = {i: job.output for i, job in enumerate(jobs) if job.output is not None}
    backend._sampler = sampler
    speeds: dict[str, list[float]] = {"off": [], "prompt-lookup": []}
    for i in range(rounds):
        for name in list(speeds) if i % 2 == 0 else reversed(list(speeds)):
            speed, engine = run(backend, replace(config, speculation=name), jobs, tokens)
            speeds[name].append(speed)
            if name != "off":
                stats = engine.stats()
    ratio = median(on / off for on, off in zip(speeds["prompt-lookup"], speeds["off"], strict=True))
    return Result(
        model, workload, batch, median(speeds["off"]), median(speeds["prompt-lookup"]), ratio, stats.tokens_drafted, stats.tokens_accepted,
        batch * tokens,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=["embedded"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--tokens", type=int, default=256, help="of output, for each request (default: 256)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    results = []
    print(f"{'model':12} {'workload':9} {'batch':>5} {'off':>9} {'on':>9}  {'on / off':>8}   guessed, right, of the output")
    for model in args.models:
        config = EngineConfig(model=model, kv_memory="1GiB", max_model_len=1400, prefix_caching=False, max_num_seqs=max(args.batch))
        backend = CpuBackend.open(config)
        for batch in args.batch:
            for workload in args.only:
                r = measure(model, backend, config, workload, batch, args.tokens, args.rounds)
                results.append(r)
                share = f"{r.drafted:,}, {r.accepted:,}, {r.accepted / r.output:.0%}"
                print(f"{Path(model).name:12} {workload:9} {batch:5} {r.off:9.1f} {r.on:9.1f}  {r.ratio:7.3f}x   {share}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
