"""What the documentation tells people to type exists, with these options; what it links to is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.cli.main import build_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not set(page.relative_to(ROOT).parts) & {"build", "node_modules"}
    and not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
START = re.compile(r"(?:\S*bin/)?(?:python\S* )?(?P<what>quire(?: |$)|make(?: |$)|(?:benchmarks|tools)/\w+\.py\b)")


def commands(page: Path) -> Iterator[str]:
    """The lines of code blocks and the spans of code that are a command of ours; variables before it are left out."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(span.replace("\n", " ") for span in SPAN.findall(FENCE.sub("", text)))]:
        command = re.sub(r"^\s*(?:\$ )?(?:\w+=\S+ )*", "", line)
        if START.match(command):
            yield re.split(r" #| \||;| &&| >|\.\.\.", command)[0].replace("[", "").replace("]", "").strip()


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)})


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 80
    assert any(command.startswith("quire serve ") for _, command in COMMANDS)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_exists_with_its_options(page: str, command: str) -> None:
    words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if START.match(word) or word.endswith("bin/quire")) :]
    if words[0].endswith("quire"):
        _check_quire(words[1:])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"the Makefile has no {target}"
    else:
        script = ROOT / words[0]
        assert script.exists()
        source = script.read_text(encoding="utf-8")
        for option in (word.partition("=")[0] for word in words[1:] if word.startswith("--") and " " not in word):
            if f'"{option}"' not in source:
                assert "parse_known_args" in source, f"{words[0]} has no {option}"
                _check_quire(["serve", option])  # what it does not know is the server's


def _check_quire(words: list[str]) -> None:
    """Mentions (`quire serve`) need not be whole: their words and options exist all the same."""
    parser = build_parser()
    for word in words:
        choices = next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})
        if word in choices:
            parser = choices[word]
        elif word.startswith("--"):
            assert word.partition("=")[0] in parser._option_string_actions, f"{parser.prog} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}"
