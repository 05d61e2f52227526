"""quire run [MODEL]: complete a prompt in the terminal, token by token."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quire.config import MODEL_HELP, EngineConfig, add_arguments, read_config_file, resolve
from quire.errors import QuireError

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.sampling_params import SamplingParams


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="complete a prompt in the terminal",
        description="Complete a prompt in the terminal. Without -p, prompts are read line by line.",
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
                        help=MODEL_HELP)  # fmt: skip
    parser.add_argument("-p", "--prompt", help="text to complete; \\n is not special, use your shell's $'...'")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate at most (default: 128)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's own, else 0)")
    parser.add_argument("--top-p", type=float, metavar="P", help="default: the model's own, else 1")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 keeps every token (default: the model's own, else 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the output at this text; may be repeated")
    parser.add_argument("--config", metavar="FILE", help="TOML file with options of the engine")
    add_arguments(parser, EngineConfig)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from quire.llm import LLM
    from quire.sampling_params import SamplingParams

    (config,) = resolve((EngineConfig,), vars(args), read_config_file(args.config))
    given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(args, name)) is not None}
    fixed = {"max_tokens": args.max_tokens, "stop": args.stop, "seed": config.seed if "seed" in vars(args) else None}
    SamplingParams(**given, **fixed)  # a typing error should not cost a load
    llm = LLM.from_config(config)
    params = SamplingParams(**{"temperature": 0.0, **dict(llm.backend.spec.sampling_defaults), **given}, **fixed)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    if args.prompt is not None:
        _complete(llm, args.prompt, params)
        return 0
    return _read_prompts(llm, params)


def _read_prompts(llm: LLM, params: SamplingParams) -> int:
    """Complete prompts until the input ends. One that can't be served is reported, and the next one read."""
    code = 0
    for line in _lines():
        if line.strip():
            try:
                _complete(llm, line.rstrip("\n"), params)
            except QuireError as e:
                print(f"quire: {e.message}", file=sys.stderr)
                code = e.exit_code
    return code


def _lines() -> Iterator[str]:
    """Lines of standard input; at a terminal with line editing and a history."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are reported as a bad prompt
    if not sys.stdin.isatty():
        yield from iter(sys.stdin.readline, "")
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # from then on input() edits lines
    print("One prompt a line; Ctrl-D ends.", file=sys.stderr)
    while True:
        # input() has the terminal in a mode of its own, which an exit on the spot would leave behind.
        at_once = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            signal.signal(signal.SIGINT, at_once)
        yield line


def _complete(llm: LLM, prompt: str, params: SamplingParams) -> None:
    pieces = llm.stream(prompt, params)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
