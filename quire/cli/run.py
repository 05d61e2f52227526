"""quire run [MODEL]: complete a prompt in the terminal, token by token."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from quire.config import EMBEDDED_MODEL, EngineConfig, add_arguments, read_config_file, resolve
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
                        help=f"folder in Hugging Face format (default: {EMBEDDED_MODEL}, the model that ships with Quire)")  # fmt: skip
    parser.add_argument("-p", "--prompt", help="text to complete; \\n is not special, use your shell's $'...'")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps every token (default: 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the output at this text; may be repeated")
    parser.add_argument("--config", metavar="FILE", help="TOML file with options of the engine")
    add_arguments(parser, EngineConfig)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from quire.llm import LLM
    from quire.sampling_params import SamplingParams

    (config,) = resolve((EngineConfig,), vars(args), read_config_file(args.config))
    # Sampling is checked before the model is loaded: a typo should not cost a load.
    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_tokens=args.max_tokens, stop=args.stop,
        seed=config.seed if "seed" in vars(args) else None,
    )  # fmt: skip
    llm = LLM.from_config(config)
    if args.prompt is not None:
        _complete(llm, args.prompt, params)
        return 0
    return _read_prompts(llm, params)


def _read_prompts(llm: LLM, params: SamplingParams) -> int:
    """One prompt a line until the input ends. A prompt that can't be served is reported, and the next one read."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("One prompt a line; Ctrl-D ends.", file=sys.stderr)
    code = 0
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return code
        if line.strip():
            try:
                _complete(llm, line.rstrip("\n"), params)
            except QuireError as e:
                print(f"quire: {e.message}", file=sys.stderr)
                code = e.exit_code


def _complete(llm: LLM, prompt: str, params: SamplingParams) -> None:
    pieces = llm.stream(prompt, params)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
