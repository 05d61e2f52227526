"""Settings files of other programs: one entry is set, everything else stays as it is, and what was there is kept beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

Change = Callable[[str, Mapping[str, Any], bool], str]
"""(text of the file, {"a.b": value to be there}, whether another value may be replaced) → the new text. Raises ConfigError."""

BY_HAND = "add the settings by hand, as they are printed without --write"


def write(path: Path, change: Callable[[str], str]) -> Path | None:
    """Put ``change`` of a file's text in its place, whole. Where the text that was there is kept, if there was any.

    Raises ConfigError, and has changed nothing then.
    """
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        try:
            after = change(before)
        except ConfigError as e:
            raise ConfigError(f"{path}: {e.message}") from None
        if after == before:
            return None
        target = path.resolve()  # a link stays one
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".quire-new")
        # It may hold keys.
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(after)
        backup = None
        if before:
            numbers = ("", *(f".{number}" for number in range(1, 1000)))
            backup = next(path for number in numbers if not (path := target.with_name(f"{target.name}.before-quire{number}")).exists())
            shutil.copy2(target, backup)
            part.chmod(target.stat().st_mode & 0o777)
        part.replace(target)
        return backup
    except (OSError, UnicodeDecodeError) as e:
        what = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path} can't be changed: {what}") from None


def change_json(text: str, entries: Mapping[str, Any], overwrite: bool) -> str:
    """Of a file of plain JSON. One with comments is not understood."""
    try:
        file = json.loads(text) if text.strip() else {}
    except ValueError:
        raise ConfigError(f"is not plain JSON (it may have comments): {BY_HAND}") from None
    if not isinstance(file, dict):
        raise ConfigError("does not hold a JSON object")
    for name, value in entries.items():
        *folders, last = name.split(".")
        place: Any = file
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{folder} is not an object: {BY_HAND}")
        _check(name, place.get(last), value, overwrite)
        place[last] = value
    return json.dumps(file, indent=2, ensure_ascii=False) + "\n"


def change_toml(text: str, entries: Mapping[str, Mapping[str, Any]], overwrite: bool) -> str:
    """Of a TOML file; entries are tables of texts. Comments and order stay."""
    before = _toml(text)
    after = text
    for name, table in entries.items():
        found: Any = before
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        _check(name, found, table, overwrite)
        if found == table:
            continue
        lines = [f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()), ""]
        if found is not None:  # from its head to the next one
            after = re.sub(rf"(?m)^\[{re.escape(name)}\][^\n]*\n(?:(?!\[)[^\n]*(?:\n|\Z))*", "", after)
        after = f"{after.rstrip()}\n\n" if after.strip() else ""
        after += "\n".join(lines)
    try:
        made: dict[str, Any] | None = tomllib.loads(after)
    except ValueError:
        made = None
    if made is not None:
        for name, table in entries.items():
            *folders, last = name.split(".")
            place: Any = before
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = dict(table)
    if made != before:
        raise ConfigError(f"is written in a way that can't be changed here: {BY_HAND}")
    return after


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as e:
        raise ConfigError(f"is not valid TOML: {e}") from None


def _check(name: str, found: object, value: object, overwrite: bool) -> None:
    if found is not None and found != value and not overwrite:
        raise ConfigError(f"has another {name} already: look at it, and add --overwrite to replace it (the file that it is now is kept)")
