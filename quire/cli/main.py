"""The quire command: finds the subcommand, and turns errors into one line on stderr and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. Only argparse is imported before the subcommand is known, so
that ``quire --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from quire import __version__
from quire.cli import batch, bench, chat, doctor, launch, plan, run, serve, simulate, top
from quire.errors import QuireError

FOREIGN = {
    "--model": "the model is the argument without a name", "-m": "the model is the argument without a name",
    "--ctx-size": "it is --max-model-len here", "-c": "it is --max-model-len here", "--context-length": "it is --max-model-len here",
    "--gpu-memory-utilization": "it is --kv-memory here, in bytes", "--mem-fraction-static": "it is --kv-memory here, in bytes",
    "--n-gpu-layers": "all layers run on --device cuda, or none", "-ngl": "all layers run on --device cuda, or none",
    "--parallel": "it is --max-num-seqs here", "-np": "it is --max-num-seqs here", "--max-running-requests": "it is --max-num-seqs here",
    "--alias": "it is --served-model-name here", "--api-key": "it is --api-keys here, a file", "--cache-type-k": "it is --kv-dtype here",
    "--kv-cache-dtype": "it is --kv-dtype here", "--tensor-parallel-size": "it is --tensor-parallel here",
    "--tp": "it is --tensor-parallel here",
}  # fmt: skip
"""Options of vLLM, llama.cpp and SGLang that have another name here."""
LIKENESS = 0.75
"""Of an unknown option to the known one that was meant."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line. Subcommands refuse their unknown options themselves, and name the nearest known one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}{self._hint(extra[0])}")
        return parsed, extra

    def _hint(self, argument: str) -> str:
        from difflib import get_close_matches

        name, known = argument.partition("=")[0], list(self._option_string_actions)
        if not name.startswith("-"):
            return ""
        if name in FOREIGN:
            return f" ({FOREIGN[name]})"
        close = [option for option in known if len(name) > 2 and option.startswith(name)]
        close = close or get_close_matches(name, known, n=1, cutoff=LIKENESS)
        return f" (did you mean {close[0]}?)" if close else ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"quire: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="quire", description="Serve language models with a paged KV cache.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"quire {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in (serve, run, chat, top, batch, launch, bench, plan, simulate, doctor):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    # Ctrl-C ends the process on the spot (a server takes the signal over once it serves). A KeyboardInterrupt could be
    # swallowed by an import that it hits, and Python aborts when it finalizes while a thread is in native code.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if os.getpid() == 1:
        # The first process of a container is not ended by a signal that it has no handler for: `docker stop`, before the server
        # takes SIGTERM over, would wait in vain.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    _open_closed_streams()
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except QuireError as e:
        print(f"quire: {e.message}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:  # the reader of our output went away, e.g. `quire run ... | head`
        _forget_output()
        return 141
    except OSError as e:  # e.g. the disk that our output goes to is full
        print(f"quire: {e.strerror or e}{f': {e.filename}' if e.filename else ''}", file=sys.stderr)
        _forget_output()
        return 1


def _open_closed_streams() -> None:
    """Where the caller closed standard streams (``>&-``) they are nothing's: the next file or socket would be given their numbers, and
    what is printed would end there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def _forget_output() -> None:
    """What is left in the buffer of stdout goes nowhere: Python would fail again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
