"""Walks every import of the package and fails on an arrow that docs/design.md §3 does not have."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import quire

ROOT = Path(quire.__file__).parent
BASE = {"errors", "config", "sampling_params", "structured", "outputs", "logs", "machine", "gguf"}
"""Modules that everything may import. They import each other only."""

SHARED = {"backends.rows", "backends.parameters", "backends.memory", "backends.pooling", "backends.progress"}

# Room → rooms (or single modules) that it may import, besides itself and BASE.
ALLOWED: dict[str, set[str]] = {
    "cli": {
        "server",
        "bench",
        "planner",
        "simulator",
        "llm",
        "workload",
        "core",
        "text",
        "models",
        "backends.base",
        "backends.memory",
        "backends.cpu",
    },
    "server": {"core", "text", "grammar", "models.spec", "backends.base"},
    "bench": {"workload", "core", "models.spec", "models.weights", "text", "llm", "simulator"},
    "planner": {"core.plan", "models.spec", "models.quantization", "models.parallel", "backends.memory"},
    "simulator": {"workload", "core", "models.spec", "llm"},
    "llm": {"core", "text", "grammar", "models.spec", "backends.base"},
    "backends": set(),
    "backends.base": {"models", "core.groups", "core.plan", "backends.cpu", "backends.cuda"},
    "backends.rows": {"core.plan"},
    "backends.parameters": {"core.plan", "backends.rows"},
    "backends.pooling": {"core.plan", "backends.parameters"},
    "backends.memory": {"models", "core.groups"},
    "backends.progress": set(),
    **dict.fromkeys(("backends.cpu", "backends.cuda"), SHARED | {"models", "core.groups", "core.plan", "backends.base"}),
    "models": set(),
    "text": set(),
    "grammar": set(),
    "workload": set(),
    "core": set(),
    "__init__": {"llm", "sampling_params", "structured"},
    **dict.fromkeys(BASE, BASE),
}
STANDARD_LIBRARY_ONLY = {"core", *BASE, "workload"}
CORE_MAY_NOT_USE = {"time", "datetime", "random", "os", "io", "socket", "threading", "asyncio", "pathlib", "subprocess"}


def room(module: str) -> str:
    """quire.core.engine → core; quire.backends.cpu.decoder → backends.cpu."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    return ".".join(parts[:2]) if parts[0] == "backends" and len(parts) > 1 else parts[0]


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import in a file, also those inside functions; ``from a import b`` gives a.b where that is a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                inside = ROOT.parent.joinpath(*name.split("."))
                is_module = inside.with_suffix(".py").exists() or inside.is_dir()
                found.append((name if is_module else node.module, node.lineno))
    return found


def allowed(source: str, target: str) -> bool:
    """May a module of room ``source`` import module ``target`` (without the leading ``quire.``)?"""
    permitted = ALLOWED[source] | {source} | (BASE if source != "__init__" else set())
    return any(target == name or target.startswith(name + ".") for name in permitted)


def test_no_arrow_that_the_design_does_not_have() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(("quire", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        source = room(module)
        assert source in ALLOWED, f"{path} is in no room of the design"
        for name, line in imports(path):
            if name.split(".")[0] == "quire":
                target = name.removeprefix("quire").lstrip(".")
                if target and not allowed(source, target):
                    wrong.append(f"{module}:{line} imports {name}")
            elif source in STANDARD_LIBRARY_ONLY and name.split(".")[0] not in sys.stdlib_module_names:
                wrong.append(f"{module}:{line} imports {name}: only the standard library is allowed")
            elif source == "core" and name.split(".")[0] in CORE_MAY_NOT_USE:
                wrong.append(f"{module}:{line} imports {name}: no I/O, clock or randomness in core")
    assert not wrong, "\n".join(wrong)


def test_the_test_sees_a_wrong_arrow() -> None:
    assert not allowed("core", "backends.cpu.backend")
    assert not allowed("backends.cpu", "core.engine")
    assert not allowed("server", "llm")
    assert not allowed("bench", "backends.base")
    assert allowed("backends.cpu", "core.plan")
