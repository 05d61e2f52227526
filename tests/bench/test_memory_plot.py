"""The picture and the table of quire bench memory, from made-up runs."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quire.bench.memory_plot import MemoryRun, describe, label, plot
from quire.errors import ConfigError


def made_up(policy: str, allocator: str | None, block_size: int | None, shares: tuple[float, ...], sequences: float) -> MemoryRun:
    token, reserved, internal, external = shares
    return {
        "policy": policy,
        "allocator": allocator,
        "block_size": block_size,
        "token_share": token,
        "reserved_share": reserved,
        "internal_share": internal,
        "external_share": external,
        "mean_sequences": sequences,
        "preemptions": 1234,
        "recomputed_tokens": 56789,
        "hit_share": 0.125,
        "saved_share": 0.0625,
    }


RUNS = [
    made_up("paged", None, 16, (0.968, 0.0, 0.022, 0.0), 30.52),
    made_up("oracle", "buddy", None, (0.38, 0.26, 0.11, 0.25), 13.6),
    made_up("max", "first_fit", None, (0.05, 0.13, 0.57, 0.25), 7.04),
]


def test_labels() -> None:
    assert [label(run) for run in RUNS] == ["paged / block 16", "oracle / buddy", "max / first_fit"]


def test_both_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png, svg = plot(RUNS, tmp_path / "memory.v2")
    assert [png.name, svg.name] == ["memory.v2.png", "memory.v2.svg"]
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    root = ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert texts >= {*map(label, RUNS), "tokens", "reserved", "internal", "external", "30.5", "13.6", "7.0", "96.8%", "38.0%"}
    assert "5.0%" not in texts, "a narrow bar has no room for it"
    again = plot(RUNS, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [data, svg.read_bytes()], "the same runs give the same bytes"


def test_bars_are_as_long_as_the_shares(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    png, _ = plot([made_up("max", "buddy", None, (0.05, 0.25, 0.45, 0.2), 3.0)], tmp_path / "one")
    pixels = (imread(png)[..., :3] * 255).round().astype(int)
    # Of each colour, the pixels in the row that has most of them.
    lengths = [
        (pixels == colour).all(axis=2).sum(axis=1).max() for colour in ((0, 114, 178), (240, 228, 66), (213, 94, 0), (187, 187, 187))
    ]
    assert [length * 0.45 / lengths[2] for length in lengths] == pytest.approx([0.05, 0.25, 0.45, 0.2], abs=0.01)


def test_table() -> None:
    lines = describe(RUNS).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert " ".join(lines[0].split()) == "memory tokens reserved internal external sequences preempted recomputed cache hits shared"
    assert " ".join(lines[1].split()) == "paged / block 16 96.8% 0.0% 2.2% 0.0% 30.5 1,234 56,789 12.5% 6.2%"
    assert lines[3].startswith("max / first_fit ")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'quire\[plot\]', or pass --no-plot"):
        plot(RUNS, tmp_path / "memory")
    assert not list(tmp_path.iterdir())


def test_nothing_to_plot_and_nowhere_to_write(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no run to plot"):
        plot([], tmp_path / "memory")
    with pytest.raises(ConfigError, match=r"can't write .*memory\.png: No such file"):
        plot(RUNS, tmp_path / "missing" / "memory")
