"""What the KV pool holds under each way of handing it out: as a picture, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from quire.errors import ConfigError


class MemoryRun(TypedDict):
    """One run. Shares are fractions of one, means over the run; those of the pool are four and add up to one at most."""

    policy: str
    """How much a sequence gets: ``paged``, or a reservation of ``core.contiguous``."""
    allocator: str | None
    """Of contiguous memory; None where there is none."""
    block_size: int | None
    """Positions; None where memory is not in blocks."""
    admission: NotRequired[str | None]
    """To paged memory."""
    token_share: float
    """Of the pool: positions that hold tokens."""
    reserved_share: float
    """Of the pool: positions that will hold tokens of their sequence later."""
    internal_share: float
    """Of the pool: positions with an owner that never uses them."""
    external_share: float
    """Of the pool: free positions that are of no use to the next sequence in line."""
    mean_sequences: float
    """That run at once."""
    preemptions: int
    recomputed_tokens: int
    hit_share: float
    """Of the prompt tokens: found in the prefix cache."""
    saved_share: float
    """Of the blocks that tables name: saved by sharing."""


# Colours of Okabe and Ito, that the colour-blind tell apart; light and dark alternate, so that a black and white print does too.
_PARTS = {"tokens": "#0072B2", "reserved": "#F0E442", "internal": "#D55E00", "external": "#BBBBBB"}


def _shares(run: MemoryRun) -> tuple[float, float, float, float]:
    """In the order of ``_PARTS``."""
    return run["token_share"], run["reserved_share"], run["internal_share"], run["external_share"]


def label(run: MemoryRun) -> str:
    """``paged / block 16 / watermark``, ``max / buddy``."""
    block = None if run["block_size"] is None else f"block {run['block_size']}"
    return " / ".join(part for part in (run["policy"], run["allocator"], block, run.get("admission")) if part)


def require_matplotlib() -> None:
    """ConfigError where matplotlib is missing: to be called before the work, so that it does not cost a run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("the plot needs matplotlib: pip install 'quire[plot]', or pass --no-plot") from None


def plot(runs: Sequence[MemoryRun], name: str | Path) -> list[Path]:
    """Draw one bar a run, the first on top, into ``name``.png and ``name``.svg; their paths.

    Raises ConfigError where there is nothing to draw, matplotlib is missing, or a file can't be written.
    """
    if not runs:
        raise ConfigError("there is no run to plot: give at least one")
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # Without pyplot, which keeps global state and looks for a display.
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(runs))
    left = [0.0] * len(runs)
    for (part, colour), widths in zip(_PARTS.items(), zip(*map(_shares, runs), strict=True), strict=True):
        axes.barh(rows, widths, 0.7, left=left, label=part, color=colour, edgecolor="white", linewidth=0.5)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    for row, run in zip(rows, runs, strict=True):
        axes.text(1.01, row, f"{run['mean_sequences']:.1f}", va="center")
        if run["token_share"] > 0.08:
            axes.text(run["token_share"] / 2, row, f"{run['token_share']:.1%}", va="center", ha="center", color="white")
    axes.text(1.01, -0.75, "sequences", va="center")
    axes.set_yticks(rows, [label(run) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of the KV pool, mean over the run")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(_PARTS), frameon=False)

    paths = [Path(f"{name}.{kind}") for kind in ("png", "svg")]
    # Letters stay text in the SVG; the same runs give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "quire"}):
        for path in paths:
            try:
                figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
            except OSError as e:
                raise ConfigError(f"can't write {path}: {e.strerror or e}") from None
    return paths


def describe(runs: Sequence[MemoryRun]) -> str:
    """The runs as a table for the terminal, in their order."""
    rows = [("memory", *_PARTS, "sequences", "preempted", "recomputed", "cache hits", "shared")]
    for run in runs:
        shares = (f"{share:.1%}" for share in _shares(run))
        counts = (f"{run['mean_sequences']:.1f}", f"{run['preemptions']:,}", f"{run['recomputed_tokens']:,}")
        rows.append((label(run), *shares, *counts, f"{run['hit_share']:.1%}", f"{run['saved_share']:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    )
