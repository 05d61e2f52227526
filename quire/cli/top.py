"""quire top: what a server does, live in the terminal. The same feed as the page's at /."""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any

from quire.errors import ConfigError, QuireError

RETRY_S = 1.0
SILENT_S = 40.0
"""After this long without a sign of life the connection counts as lost; the server says something every 15 seconds."""
FEW = 5
"""Pictures that are looked at where they are printed once: about a second."""
LOOK_S = 0.1
"""Between two looks at the keyboard."""


class UnreachableError(QuireError):
    """No server answers."""

    code = "unreachable"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "top",
        help="show what a server does, live",
        description="Show the KV memory, the sequences and the latencies of a running server, live; q ends. Where the output is no "
        "terminal, print them once.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", metavar="URL", help="address of the server (default: http://127.0.0.1:8000)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="where the server asks for one (default: QUIRE_API_KEY in the environment)")
    parser.add_argument("--once", action="store_true", help="print what there is to see once, also at a terminal")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    key = args.api_key or os.environ.get("QUIRE_API_KEY")
    if args.once or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        from quire.cli.top_screen import Style, screen
        from quire.server.page.view import View

        view = View()
        for picture in islice(pictures(args.url, key), FEW):  # rates are differences
            view.apply(picture)
            if picture["engine"]["state"] != "running":
                break
        print("\n".join(screen(view, args.url, shutil.get_terminal_size().columns, None, Style.of(sys.stdout))))
        return 0
    check(args.url)
    return _live(args.url, key)


def check(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path before /page/events). Raises ConfigError."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url!r:.100} is not an address of a server: write for example http://127.0.0.1:8000", param="url")
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1")


def pictures(url: str, key: str | None) -> Iterator[dict[str, Any]]:
    """What the server sends, until it goes. Raises ConfigError, UnreachableError, or another QuireError with the server's words."""
    import http.client
    import json

    scheme, host, port, path = check(url)
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    if key and not (key.isascii() and key.isprintable() and " " not in key):  # http.client's own message would show it
        raise ConfigError("the API key has spaces, line ends or characters beyond ASCII: no header can bring it", param="api_key")
    connection: http.client.HTTPConnection | None = None
    try:
        connection = kind(host, port, timeout=SILENT_S)
        connection.request("GET", f"{path}/page/events", headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        if response.status == 401:
            trouble = "the key is not one that the server knows" if key else "the server asks for an API key"
            raise ConfigError(f"{trouble}: give --api-key, or QUIRE_API_KEY in the environment", param="api_key")
        if response.status != 200:
            raise UnreachableError(f"{url} answered {response.status}: is it a Quire server?")
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: a name or a path that can't be asked for
        reason = (e.strerror if isinstance(e, OSError) else "") or str(e) or type(e).__name__
        raise UnreachableError(f"no server answers at {url} ({reason}): start one with quire serve, or name another --url") from None
    finally:
        if connection is not None:
            connection.close()


def _live(url: str, key: str | None) -> int:
    import threading

    from quire.cli.top_screen import Style, message, screen
    from quire.server.page.view import View

    news: SimpleQueue[dict[str, Any] | QuireError] = SimpleQueue()
    threading.Thread(target=_follow, args=(url, key, news), daemon=True).start()
    view, style, trouble = View(), Style.of(sys.stdout), "connecting"
    with _terminal() as pressed:
        while pressed() not in ("q", "Q", "\x03", "\x04"):
            size = shutil.get_terminal_size()
            try:
                got: dict[str, Any] | QuireError | None = news.get(timeout=LOOK_S)
                while not news.empty():  # a slow terminal shows the newest
                    _take(view, got)
                    got = news.get()
            except Empty:
                got = None
            if isinstance(got, ConfigError):
                raise got
            trouble = _take(view, got) if got is not None else trouble
            if got is not None or trouble:
                lines = screen(view, url, size.columns, size.lines, style) if view.facts else []
                if trouble:
                    lines = message(trouble, lines, size.columns, style)
                sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines[: size.lines - 1]) + "\x1b[J")
                sys.stdout.flush()
    return 0


def _take(view: Any, got: dict[str, Any] | QuireError | None) -> str:
    """What is wrong, if anything."""
    if isinstance(got, QuireError):
        return got.message
    if got is not None:
        view.apply(got)
    return ""


def _follow(url: str, key: str | None, news: SimpleQueue[dict[str, Any] | QuireError]) -> None:
    import time

    while True:
        try:
            for picture in pictures(url, key):
                news.put(picture)
            news.put(UnreachableError(f"the server at {url} has ended the connection; trying again every second"))
        except QuireError as e:
            news.put(e)
        time.sleep(RETRY_S)


@contextmanager
def _terminal() -> Iterator[Any]:
    """The terminal's other screen, without a cursor. Gives a function that says which key was pressed, '' for none."""
    import termios
    import tty

    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = None if keyboard is None else termios.tcgetattr(keyboard)

    def pressed() -> str:
        if keyboard is None or not select.select([keyboard], [], [], 0)[0]:
            return ""
        return os.read(keyboard, 1).decode("ascii", "replace")

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    # An exit on the spot would leave the terminal as it is.
    at_once = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        if keyboard is not None:
            tty.setcbreak(keyboard)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        yield pressed
    finally:
        for number in at_once:
            signal.signal(number, signal.SIG_IGN)  # a second one would leave it half done
        with suppress(OSError, termios.error):  # after SIGHUP there may be no terminal
            sys.stdout.write("\x1b[?25h\x1b[?1049l")
            sys.stdout.flush()
            if keyboard is not None and before is not None:
                termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        for number, handler in at_once.items():
            signal.signal(number, handler)
