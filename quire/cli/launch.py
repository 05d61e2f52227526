"""quire launch claude|codex|opencode: the settings with which a coding tool uses a running server."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.cli.settings_files import Change, change_json, change_toml, write
from quire.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
NO_KEY = "none"
"""What is sent where the server asks for no key: the tools insist on one."""
KEY_VARIABLE = "QUIRE_API_KEY"
SMALL_CONTEXT = 32_768
"""Tokens; the tools' own instructions and tools take 10,000 to 20,000 of them."""


@dataclass(slots=True, frozen=True)
class Server:
    """What a tool has to know."""

    url: str
    model: str
    context: int
    api_key: str | None

    @property
    def output(self) -> int:
        """Tokens of an answer at most: the rest of the context is for the prompt."""
        return max(1, self.context // 4)


@dataclass(slots=True, frozen=True)
class Tool:
    """One tool: what is printed for it, what is written for it, how it is started then."""

    about: str
    shown: Callable[[Server], str]
    path: Callable[[], Path]
    change: Change
    command: Callable[[Server], str]
    """After the settings were written."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "launch",
        help="settings for coding tools: " + ", ".join(TOOLS),
        description="Print the settings with which a coding tool uses a running server, or write them where the tool looks for them. The "
        "server is asked for its model and its context.",
        allow_abbrev=False,
    )
    parser.add_argument("tool", choices=list(TOOLS), metavar="|".join(TOOLS), help="the tool")
    parser.add_argument("--url", default=DEFAULT_URL, metavar="URL", help=f"address of the server (default: {DEFAULT_URL})")
    parser.add_argument("--api-key", metavar="KEY", help=f"where the server asks for one (default: {KEY_VARIABLE} in the environment)")
    parser.add_argument("--model", metavar="NAME", help="of the server's names for its model (default: the first)")
    parser.add_argument("--write", action="store_true", help="write the tool's settings file; what was in it is kept beside it")
    parser.add_argument("--overwrite", action="store_true", help="with --write: change settings that have other values already")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    tool, server = TOOLS[args.tool], ask(args.url, args.api_key or os.environ.get(KEY_VARIABLE), args.model)
    if server.context < SMALL_CONTEXT:
        print(
            f"quire: {server.model} is served with a context of {server.context:,} tokens; {args.tool} sends 10,000 to 20,000 before your "
            "first word, and will hardly work with less than 32,768",
            file=sys.stderr,
        )
    if args.tool == "claude" and server.model.startswith("claude-"):
        print(
            f"quire: Claude Code takes {server.model} for a model of Anthropic's and ignores the server's context: serve it under another "
            "name too (--served-model-name NAME,NAME), and choose that one with --model",
            file=sys.stderr,
        )
    if not args.write:
        print(tool.shown(server))
        return 0
    path = tool.path()
    backup = write(path, lambda text: tool.change(text, entries(args.tool, server), args.overwrite))
    print(f"{path} is written{f'; what it was is in {backup.name}' if backup else ''}. Start it with:\n  {tool.command(server)}")
    return 0


def ask(url: str, api_key: str | None, name: str | None) -> Server:
    """Raises RemoteError, or ConfigError where the server has no model of that name."""
    from quire.cli.remote import Remote, RemoteError

    remote = Remote(url, api_key)
    try:
        cards = {str(card["id"]): int(card["max_model_len"]) for card in remote.get("/v1/models")["data"]}
    except (KeyError, TypeError, ValueError):
        raise RemoteError(f"{remote.url} does not say which model it has, as a Quire server does at /v1/models") from None
    if not cards or (name is not None and name not in cards):
        raise ConfigError(f"{remote.url} has no model {name!r}; it has {', '.join(cards) or 'none'}", param="model")
    model = name or next(iter(cards))
    return Server(remote.url, model, cards[model], api_key)


def entries(tool: str, server: Server) -> dict[str, Any]:
    """Where in the tool's settings → what is to be there."""
    if tool == "claude":
        return {f"env.{name}": value for name, value in claude_variables(server).items()}
    if tool == "codex":
        return {"model_providers.quire": codex_provider(server)}
    return {"provider.quire": opencode_provider(server)}


def claude_variables(server: Server) -> dict[str, str]:
    """https://code.claude.com/docs/en/env-vars"""
    return {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": server.api_key or NO_KEY,
        "ANTHROPIC_MODEL": server.model,
        "ANTHROPIC_DEFAULT_FABLE_MODEL": server.model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": server.model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": server.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": server.model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(server.context),  # else it takes 200,000 or a million, and never shortens in time
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(server.output),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def codex_provider(server: Server) -> dict[str, Any]:
    """A table of model_providers: https://developers.openai.com/codex/config-reference. "responses" is the one API that it speaks."""
    key = {"env_key": KEY_VARIABLE} if server.api_key else {}
    return {"name": "Quire", "base_url": f"{server.url}/v1", "wire_api": "responses", **key}


def opencode_provider(server: Server) -> dict[str, Any]:
    """An entry of provider: https://opencode.ai/docs/providers (custom provider)."""
    key = {"apiKey": f"{{env:{KEY_VARIABLE}}}"} if server.api_key else {}
    return {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Quire",
        "options": {"baseURL": f"{server.url}/v1", **key},
        "models": {server.model: {"name": server.model, "limit": {"context": server.context, "output": server.output}}},
    }


def _claude_shown(server: Server) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in claude_variables(server).items()]
    return "\n".join([*exports, "claude"])


def _codex_shown(server: Server) -> str:
    table = change_toml("", {"model_providers.quire": codex_provider(server)}, False)
    return f"# in {TOOLS['codex'].path()}:\n{table}\n# and then:\n{_codex_command(server)}"


def _codex_command(server: Server) -> str:
    key = f"{KEY_VARIABLE}=... " if server.api_key else ""
    return f"{key}codex -c model_provider=quire -c model_context_window={server.context} -m {shlex.quote(server.model)}"


def _opencode_shown(server: Server) -> str:
    file = {"$schema": "https://opencode.ai/config.json", "provider": {"quire": opencode_provider(server)}}
    return json.dumps(file, indent=2, ensure_ascii=False)


def _opencode_command(server: Server) -> str:
    return f"{f'{KEY_VARIABLE}=... ' if server.api_key else ''}opencode -m {shlex.quote(f'quire/{server.model}')}"


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ[variable]) if os.environ.get(variable) else Path.home() / default


TOOLS = {
    "claude": Tool(
        "Claude Code", _claude_shown, lambda: _folder("CLAUDE_CONFIG_DIR", ".claude") / "settings.json", change_json, lambda _: "claude"
    ),
    "codex": Tool("Codex", _codex_shown, lambda: _folder("CODEX_HOME", ".codex") / "config.toml", change_toml, _codex_command),
    "opencode": Tool(
        "opencode", _opencode_shown, lambda: _folder("XDG_CONFIG_HOME", ".config") / "opencode" / "opencode.json", change_json,
        _opencode_command,
    ),
}  # fmt: skip
