"""quire chat [MODEL]: talk to a model in the terminal, in this process or on a running server."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from quire.config import MODEL_HELP, EngineConfig, add_arguments, read_config_file, resolve
from quire.errors import ConfigError, InvalidRequestError, QuireError

if TYPE_CHECKING:
    from quire.cli.chat_talkers import Talker

HELP = """\
/help            this
/clear           forget the conversation; the system message stays
/system [TEXT]   say how the model should answer, and forget the conversation; without TEXT: no system message
/save FILE       write the conversation to FILE, as the messages of a request (JSON)
/regenerate      answer the last message again
/exit            leave; Ctrl-D too
Ctrl-C stops an answer. Text of several lines may be pasted, or stand between lines of \"\"\"."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal: one that is loaded here, or with --url one that a server has. The model needs a "
        "chat template. /help lists the commands of a conversation.",
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
                        help=MODEL_HELP)  # fmt: skip
    parser.add_argument("--url", metavar="URL", help="talk to the model of this server instead, for example http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", help="with --url, where the server asks for one (default: QUIRE_API_KEY)")
    parser.add_argument("--system", metavar="TEXT", help="message that says how the model should answer")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of an answer at most (default: what the context leaves)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's own, else 1)")
    parser.add_argument("--top-p", type=float, metavar="P", help="default: the model's own, else 1")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 keeps every token (default: the model's own, else 0)")
    parser.add_argument("--config", metavar="FILE", help="TOML file with options of the engine")
    add_arguments(parser, EngineConfig)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from quire.cli.chat_talkers import Local, Served

    names = ("max_tokens", "temperature", "top_p", "top_k")
    settings = {name: value for name in names if (value := getattr(args, name)) is not None}
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are reported as a bad message
    talker: Talker
    if args.url is not None:
        known = [name for name in ("model", *EngineConfig.__dataclass_fields__) if name in vars(args)]
        if known:
            raise ConfigError(f"--url names a server that has its model already: leave out {known[0].replace('_', '-')}", param=known[0])
        talker = Served(args.url, args.api_key or os.environ.get("QUIRE_API_KEY"), settings)
    else:
        (config,) = resolve((EngineConfig,), vars(args), read_config_file(args.config))
        talker = Local(config, settings)
    if sys.stdin.isatty():
        print(f"{talker.name}: /help lists the commands, Ctrl-D ends.", file=sys.stderr)
    return Chat(talker, args.system).run()


@dataclass(slots=True)
class Chat:
    """One conversation."""

    talker: Talker
    system: str | None
    messages: list[dict[str, Any]] = field(default_factory=list)
    """Without the system message."""
    code: int = 0

    def run(self) -> int:
        """Until the input ends. The exit code: that of the last error, where something failed."""
        from quire.cli.terminal import read_message

        while (said := read_message()) is not None:
            text, is_line = said
            if not text.strip():
                continue
            try:
                if is_line and text.startswith("/"):
                    if not self._command(*text.strip().partition(" ")[::2]):
                        break
                else:
                    self._ask(text)
            except QuireError as e:
                print(f"quire: {e.message}", file=sys.stderr)
                self.code = e.exit_code
        return self.code

    @property
    def whole(self) -> list[dict[str, Any]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def _command(self, name: str, rest: str) -> bool:
        """False: leave."""
        rest = rest.strip()
        match name:
            case "/help":
                print(HELP, file=sys.stderr)
            case "/clear":
                self.messages.clear()
            case "/system":
                self.system = rest or None
                self.messages.clear()
            case "/save":
                self._save(rest)
            case "/regenerate":
                self._regenerate()
            case "/exit" | "/quit" | "/bye":
                return False
            case _:
                raise InvalidRequestError(f"there is no command {name[:40]}: /help lists them")
        return True

    def _save(self, name: str) -> None:
        if not name:
            raise InvalidRequestError("say where to: /save FILE")
        try:
            with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
                json.dump({"messages": self.whole}, file, ensure_ascii=False, indent=1)
                file.write("\n")
        except OSError as e:
            raise ConfigError(f"can't write {name}: {e.strerror}") from None
        print(f"{len(self.messages):,} messages are in {name}", file=sys.stderr)

    def _regenerate(self) -> None:
        if len(self.messages) < 2:
            raise InvalidRequestError("nothing was answered yet")
        last = self.messages[-2:]
        del self.messages[-2:]
        try:
            self._ask(str(last[0]["content"]))
        except QuireError:
            self.messages += last
            raise

    def _ask(self, text: str) -> None:
        """Answer a message. One that can't be answered is taken back."""
        self.messages.append({"role": "user", "content": text})
        parts: list[str] = []
        start, first = time.monotonic(), 0.0
        try:
            with _stoppable(self.talker) as stopped, closing(self.talker.answer(self.whole)) as pieces:
                for piece in pieces:
                    first = first or time.monotonic()
                    parts.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    if stopped:
                        break
        except BaseException:
            if not parts:
                self.messages.pop()
            raise
        finally:
            if parts:
                self.messages.append({"role": "assistant", "content": "".join(parts)})
                sys.stdout.write("\n")
                sys.stdout.flush()
        if not parts:
            self.messages.append({"role": "assistant", "content": ""})
        self._tell(start, first or time.monotonic(), time.monotonic(), bool(stopped))

    def _tell(self, start: float, first: float, end: float, stopped: bool) -> None:
        taken = self.talker.taken
        rate = f", {(taken.completion_tokens - 1) / (end - first):.1f} tokens/s" if taken.completion_tokens > 1 and end > first else ""
        line = (
            f"[{taken.completion_tokens:,} tokens{rate}, the first after {first - start:.2f} s; {taken.prompt_tokens:,} prompt tokens, "
            f"{taken.cached_tokens:,} of them cached{'; stopped' if stopped else ''}]"
        )
        print(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line, file=sys.stderr)


@contextmanager
def _stoppable(talker: Talker) -> Iterator[list[bool]]:
    """Ctrl-C stops the answer (the list is no longer empty then); a second one before it has stopped ends the process."""
    stopped: list[bool] = []

    def stop(_: int, __: FrameType | None) -> None:
        if stopped:
            os._exit(130)
        stopped.append(True)
        talker.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
