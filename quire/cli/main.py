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

from quire import __version__
from quire.cli import bench, run, serve
from quire.errors import QuireError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quire", description="Serve language models with a paged KV cache.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"quire {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in (serve, run, bench):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    # Ctrl-C ends the process on the spot (a server takes the signal over once it serves). A KeyboardInterrupt could be
    # swallowed by an import that it hits, and Python aborts when it finalizes while a thread is in native code.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except QuireError as e:
        print(f"quire: {e.message}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:  # the reader of our output went away, e.g. `quire run ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
