"""API keys: who may use the server, and how much. ``--api-keys FILE`` names a TOML file with a table for each caller:

    [alice]
    key = "sk-..."                  # at least 16 characters
    requests_per_minute = 60        # each limit may be left out
    tokens_per_minute = 100000      # prompts and outputs together
    max_concurrent = 8              # calls in flight

Keys are kept as SHA-256, and compared in constant time: neither the time that a refusal takes nor this process's memory tells
what they are.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
import tomllib
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from quire.core.sequence import MAX_PRIORITY
from quire.errors import ConfigError, QuireError
from quire.server.http.errors import RateLimitError, UnauthorizedError, error_response
from quire.server.page import assets

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics", *assets.PATHS})
"""They say nothing of anybody's requests, and those that ask have no keys: probes, and a browser that opens the page, which then asks
for the key. What the page shows is not among them."""
MIN_KEY_CHARS = 16
MAX_LIMIT = 1 << 40
BACKGROUND = 1 << 30
"""Priority of work in the background. (Lower runs earlier, and requests have 0 unless they say otherwise.)"""
LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")


class Bucket:
    """So much a minute: it fills up evenly, and holds at most what a minute brings. It may be overdrawn, which is paid back first."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def wait_s(self) -> float:
        """Seconds until something may be taken; 0 where it may be now."""
        now = self._clock()
        self._level = min(self._per_minute, self._level + (now - self._at) * self._per_minute / 60)
        self._at = now
        return max(0.0, (1 - self._level) * 60 / self._per_minute)

    def take(self, amount: int) -> None:
        self._level -= amount


@dataclass(slots=True)
class Caller:
    """Whoever has one of the keys; where the server has none, everybody together."""

    name: str = ""
    requests: Bucket | None = None
    tokens: Bucket | None = None
    max_concurrent: int | None = None
    concurrent: int = 0
    """Calls in flight."""
    background: bool = False
    """Its work waits for everybody else's, and takes no place in the queue from them: lines of batches."""

    @property
    def tenant(self) -> bytes:
        """What its cached prefixes are known by: nobody else finds them."""
        return self.name.encode()

    def priority(self, asked: int) -> int:
        """Of its requests, where they ask for ``asked``."""
        return max(BACKGROUND // 2, min(BACKGROUND + asked, MAX_PRIORITY)) if self.background else asked

    def enter(self) -> None:
        """A call begins. Raises RateLimitError, and changes nothing then."""
        if self.max_concurrent is not None and self.concurrent >= self.max_concurrent:
            raise RateLimitError(
                f"the key of {self.name!r} has {self.concurrent:,} calls in flight, and may have {self.max_concurrent:,}: "
                "wait for one to end"
            )
        for bucket, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if bucket is not None and (wait := bucket.wait_s()) > 0:
                raise RateLimitError(
                    f"the key of {self.name!r} has used up its {what} per minute: try again in {wait:.1f} seconds", retry_after_s=wait
                )
        self.concurrent += 1
        if self.requests is not None:
            self.requests.take(1)

    def leave(self, tokens: int) -> None:
        """It has ended, and taken ``tokens`` tokens."""
        self.concurrent -= 1
        if self.tokens is not None:
            self.tokens.take(tokens)


@dataclass(slots=True)
class Keys:
    """The callers by the SHA-256 of their keys."""

    callers: dict[bytes, Caller] = field(default_factory=dict)

    def find(self, key: str) -> Caller | None:
        """Looks at every key, wherever it finds the right one."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, caller in self.callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def read_keys(path: str, clock: Callable[[], float] = monotonic) -> Keys:
    """Raises ConfigError where the file is missing, others may read it, or something in it is wrong. No message shows a key."""

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"--api-keys {path}: {what}", param="api_keys")

    try:
        mode = Path(path).stat().st_mode
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            raise wrong(f"everybody on this machine may read or write it (mode {stat.S_IMODE(mode):03o}): chmod 600 it")
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise wrong(f"can't be read: {e.strerror}") from None
    except ValueError:  # what is wrong with it may quote a key
        raise wrong('is not valid TOML: write a table for each caller, [name], and in it key = "..."') from None
    keys = Keys()
    for name, fields in table.items():
        if not isinstance(fields, dict):
            raise wrong(f'{name} is not a table: write [{name}], and in it key = "..."')
        if unknown := sorted(fields.keys() - {"key", *LIMITS}):
            raise wrong(f"[{name}] has the unknown field {unknown[0]}; known: key, {', '.join(LIMITS)}")
        key = fields.get("key")
        if not isinstance(key, str) or len(key) < MIN_KEY_CHARS:
            raise wrong(f"[{name}] needs a key of at least {MIN_KEY_CHARS} characters")
        for limit in LIMITS:
            value = fields.get(limit, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LIMIT:
                raise wrong(f"[{name}] {limit} must be an integer from 1 to {MAX_LIMIT:,}, got {value!r:.60}")
        digest = hashlib.sha256(key.encode()).digest()
        if digest in keys.callers:
            raise wrong(f"[{name}] has the key of [{keys.callers[digest].name}]: each needs its own")
        requests, tokens = (Bucket(fields[limit], clock) if limit in fields else None for limit in LIMITS[:2])
        keys.callers[digest] = Caller(name, requests, tokens, fields.get("max_concurrent"))
    if not keys.callers:
        raise wrong('has no keys: write a table for each caller, [name], and in it key = "..."')
    return keys


class KeyCheck:
    """Around the whole application: lets nothing pass without a key, whatever its path looks like, but for OPEN_PATHS."""

    def __init__(self, app: App, keys: Keys | None, refused: Callable[[str], None]) -> None:
        """refused: told the error's code of each call that is refused."""
        self._app, self._keys, self._refused = app, keys, refused
        self._everybody = Caller()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope["caller"] = self._caller(scope)
            except QuireError as e:
                self._refused(e.code)
                await error_response(e, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        if self._keys is None or scope["path"] in OPEN_PATHS:
            return self._everybody
        key = _presented(scope["headers"])
        if key is None:
            raise UnauthorizedError("this server asks for an API key: send the header 'Authorization: Bearer KEY'")
        caller = self._keys.find(key)
        if caller is None:
            raise UnauthorizedError("the API key is not one that this server knows")
        return caller


def _presented(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The key that a request brings: as OpenAI's clients do, or as Anthropic's."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip().decode("utf-8", "surrogateescape")
        if name == b"x-api-key":
            return value.strip().decode("utf-8", "surrogateescape")
    return None
