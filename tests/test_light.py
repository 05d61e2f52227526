"""Lightness, by what is imported (how long it takes is in docs/benchmarks/)."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = [
    "numpy",
    "tokenizers",
    "fastapi",
    "pydantic",
    "uvicorn",
    "tqdm",
    "llguidance",
    "jinja2",
    "http.client",
    "sqlite3",
    "asyncio",
    "torch",
    "matplotlib",
    "quire.backends.cpu._native",
]


def imported_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    "code",
    ["import quire", "import quire.core.engine", "from quire.cli.main import build_parser; build_parser().format_help()"],
    ids=["quire", "core", "help"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert not imported_by(code) & set(HEAVY)


def test_the_offline_api_imports_no_server_and_no_torch() -> None:
    assert not imported_by("from quire import LLM") & {"fastapi", "uvicorn", "pydantic", "torch", "transformers", "llguidance"}


def test_help_and_version() -> None:
    for args in (
        ["--help"],
        ["--version"],
        ["serve", "--help"],
        ["run", "--help"],
        ["chat", "--help"],
        ["batch", "run", "--help"],
        ["launch", "--help"],
        ["bench", "throughput", "--help"],
    ):
        done = subprocess.run([sys.executable, "-P", "-m", "quire.cli.main", *args], capture_output=True, text=True, check=True)
        assert done.stdout
        assert not done.stderr
