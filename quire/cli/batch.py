"""quire batch run IN OUT: answer a file of requests, without a server."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quire.config import MODEL_HELP, EngineConfig, ServerConfig, add_arguments, model_name, read_config_file, resolve

if TYPE_CHECKING:
    from quire.server.batches.offline import Job
    from quire.server.batches.records import Answer, Batch


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("batch", help="answer a file of requests", description="Work on files of requests.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", dest="batch_command", required=True, metavar="COMMAND")
    run_parser = commands.add_parser(
        "run",
        help="answer every line of a file, without a server",
        description="Answer every line of IN, in OpenAI's format of batches: a JSON object a line with custom_id, method (POST), url "
        "(/v1/chat/completions, /v1/completions, ...) and body. OUT gets a line for each, in the same order; those that failed have the "
        "error in their place. Killed at any point, the same command goes on: what is answered is kept in OUT.quire-batch until OUT is "
        "whole. Exit code 0: every line was answered with status 200; 1: some were not.",
        allow_abbrev=False,
    )
    run_parser.add_argument("input", metavar="IN", help="JSONL file of requests")
    run_parser.add_argument("output", metavar="OUT", help="JSONL file of results")
    run_parser.add_argument("--model", default=argparse.SUPPRESS, metavar="MODEL",
                            help=MODEL_HELP)  # fmt: skip
    run_parser.add_argument("--served-model-name", default=argparse.SUPPRESS, metavar="NAME",
                            help="what lines call the model, where they name one (default: the folder's name)")  # fmt: skip
    run_parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    run_parser.add_argument("--config", metavar="FILE", help="TOML file with options of the engine and the server")
    add_arguments(run_parser, EngineConfig)
    run_parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    engine_config, server_config = resolve((EngineConfig, ServerConfig), vars(args), read_config_file(args.config))
    import logging

    from quire.models.weights import resolve_model

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    given, folder = engine_config.model, resolve_model(engine_config.model)
    engine_config = replace(engine_config, model=str(folder))
    from quire.server.batches import offline

    names = server_config.model_names or (model_name(folder, given),)
    job = offline.open_job(Path(args.input), Path(args.output), names, server_config, args.overwrite)
    if job.batch.status == "completed":  # the last run was killed just before its end
        return _done(job, job.batch, 0.0, 0)
    bar = _Bar(job.batch)
    start = time.monotonic()
    try:
        batch = offline.run(job, engine_config, server_config, folder, names, bar.update)
    except offline.InterruptedRunError as e:
        bar.close()
        answered = e.batch.total - e.batch.left
        print(f"quire: stopped; {answered:,} of {e.batch.total:,} lines are answered: the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        bar.close()
    return _done(job, batch, time.monotonic() - start, bar.tokens)


def _done(job: Job, batch: Batch, seconds: float, tokens: int) -> int:
    """Tell how it was; what it needed in between goes."""
    job.forget()
    rate = f", {tokens / seconds:,.0f} output tokens/s" if seconds else ""
    hits = f"{100 * batch.cached_tokens / batch.prompt_tokens:.1f} %" if batch.prompt_tokens else "none"
    print(
        f"{job.target}: {batch.total:,} lines, {batch.failed:,} of them failed; {batch.prompt_tokens:,} prompt tokens ({hits} found in the "
        f"cache), {batch.completion_tokens:,} output tokens{rate}",
        file=sys.stderr,
    )
    return 1 if batch.failed else 0


class _Bar:
    """How many lines are answered, where stderr is a terminal."""

    def __init__(self, batch: Batch) -> None:
        from tqdm import tqdm

        self.tokens = 0
        """That this run has made."""
        self._start = time.monotonic()
        self._bar = tqdm(total=batch.total, initial=batch.total - batch.left, desc="Batch", unit="line", disable=None)

    def update(self, answers: Sequence[Answer]) -> None:
        self.tokens += sum(answer.completion_tokens for answer in answers)
        self._bar.set_postfix_str(f"{self.tokens / (time.monotonic() - self._start):,.0f} tokens/s", refresh=False)
        self._bar.update(len(answers))

    def close(self) -> None:
        self._bar.close()
