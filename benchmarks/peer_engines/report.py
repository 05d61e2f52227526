"""What was measured, as Markdown, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peer_engines.measure import Record, figures

OURS = "quire"


def result(records: dict[str, Record], missing: dict[str, str], about: dict[str, Any]) -> dict[str, Any]:
    """All of it, as JSON has it. ``about``: model, machine, workload and so on, as they are."""
    failed = {name: record.failure for name, record in records.items() if record.failure is not None}
    engines = {
        name: {"settings": record.settings, "figures": figures(record), "agreement": record.agreement, "runs": record.runs}
        for name, record in records.items()
        if record.runs and record.failure is None
    }
    return {**about, "engines": engines, "not_measured": {**missing, **failed}}


def markdown(made: dict[str, Any]) -> str:
    """A table for each figure, then how each engine was configured."""
    machine, engines = made["machine"], made["engines"]
    lines = [
        f"# {made['model']}: {made['what']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads; {made['date']}; rounds: {made['rounds']}, in which the engines "
        "take turns, every other one in reverse order; median, slowest and fastest.",
    ]
    names = dict.fromkeys(name for engine in engines.values() for name in engine["figures"])
    for name in names:
        lines += ["", *_table(name, {engine: row["figures"][name] for engine, row in engines.items() if name in row["figures"]})]
    lines += ["", *_agreements(engines), "## How each was configured", ""]
    for engine, row in engines.items():
        settings = dict(row["settings"])
        command = settings.pop("command", None)
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        lines.append(f"- **{engine}**: {said}" + (f"\n  `{command}`" if command else ""))
    if made["not_measured"]:
        lines += ["", "## Not measured", "", *(f"- **{engine}**: {why}" for engine, why in made["not_measured"].items())]
    return "\n".join(lines) + "\n"


def _table(name: str, rows: dict[str, dict[str, float]]) -> list[str]:
    """One column for each of our engines says how many times as fast it is as the engine of the row."""
    ours = [engine for engine in rows if engine.startswith(OURS)]
    head = [name, "median", "min", "max", *(f"{engine} is" for engine in ours)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for engine, row in sorted(rows.items(), key=lambda item: -item[1]["median"]):
        ratios = ["" if one == engine else f"{rows[one]['median'] / row['median']:.2f} ×" for one in ours]
        title = f"**{engine}**" if engine in ours else engine
        lines.append(f"| {' | '.join([title, *(f'{row[key]:.1f}' for key in ('median', 'min', 'max')), *ratios])} |")
    return lines


def _agreements(engines: dict[str, Any]) -> list[str]:
    """Whether they computed the same thing at all."""
    rows = {engine: row["agreement"] for engine, row in engines.items() if row["agreement"] is not None}
    if len(rows) < 2:
        return []
    reference = next(iter(rows))
    lines = [
        f"Greedy tokens compared with those of {reference} (rounding differs, so a near tie between two tokens goes either way, and "
        "all that follows differs):",
        "",
        "| engine | requests | same first token | same throughout | mean share before the first difference |",
        "|---|---:|---:|---:|---:|",
    ]
    for engine, row in rows.items():
        if engine != reference:
            lines.append(f"| {engine} | {row['requests']} | {row['first']} | {row['same']} | {row['prefix']:.0%} |")
    return [*lines, ""]


def plot(made: dict[str, Any], file: Path) -> bool:
    """A bar for each engine, from the slowest round to the fastest a line. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    engines = made["engines"]
    names = list(dict.fromkeys(name for engine in engines.values() for name in engine["figures"]))
    picture = Figure(figsize=(8, max(1, len(names)) * (1 + 0.32 * len(engines))), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = picture.add_subplot(len(names), 1, place)
        rows = sorted(((e, r["figures"][name]) for e, r in engines.items() if name in r["figures"]), key=lambda item: item[1]["median"])
        medians = [row["median"] for _, row in rows]
        spread = [[row["median"] - row["min"] for _, row in rows], [row["max"] - row["median"] for _, row in rows]]
        colors = ["#1b6ca8" if engine.startswith(OURS) else "#b0b7bd" for engine, _ in rows]
        axes.barh([engine for engine, _ in rows], medians, xerr=spread, color=colors, ecolor="#444444", capsize=2)
        for at, value in enumerate(medians):
            axes.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:.1f}", (0, at), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle(f"{made['model']}, {made['machine']['cpu']}, {made['machine']['threads']} threads", fontsize=9)
    picture.savefig(file)
    return True


def write(made: dict[str, Any], out: Path) -> list[Path]:
    """``<out>/<kind>.md``, ``.json`` and, where matplotlib is installed, ``.svg``."""
    out.mkdir(parents=True, exist_ok=True)
    table, data, picture = (out / f"{made['kind']}{suffix}" for suffix in (".md", ".json", ".svg"))
    table.write_text(markdown(made), encoding="utf-8")
    data.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return [table, data, *([picture] if made["engines"] and plot(made, picture) else [])]
