"""quire batch run, as a process: results in order, errors in their place, and the same command goes on after any end."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from server.harness import DEADLINE_S, STOPPING, is_gone, stopped_engine, stops_after, wait_until

COMMAND = [sys.executable, "-P", "-m", "quire.cli.main", "batch", "run"]


def write(path: Path, *bodies: dict[str, Any], url: str = "/v1/completions") -> Path:
    lines = [{"custom_id": f"id-{i}", "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(source: Path, target: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, str(source), str(target), "--kv-memory", "32MiB", *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ})  # fmt: skip


def run(source: Path, target: Path, *arguments: str) -> tuple[int, str]:
    process = start(source, target, *arguments)
    out, err = process.communicate(timeout=2 * DEADLINE_S)
    assert out == ""
    assert "Traceback" not in err
    return process.returncode, err


def test_lines_are_answered_in_order_and_errors_stand_in_their_place(tmp_path: Path) -> None:
    good = {"prompt": "import os\n", "max_tokens": 8, "seed": 1, "model": "embedded"}
    source = write(tmp_path / "in.jsonl", good, good | {"max_tokens": 9999}, good | {"n": 2})
    source.write_text(
        source.read_text() + json.dumps({"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body":
                                        {"messages": [{"role": "user", "content": "é"}], "max_tokens": 3}})
    )  # fmt: skip
    target = tmp_path / "out.jsonl"
    code, err = run(source, target)
    assert code == 1
    assert "4 lines, 1 of them failed" in err
    assert "output tokens/s" in err
    found = read(target)
    assert [each["custom_id"] for each in found] == ["id-0", "id-1", "id-2", "chat"]
    assert [each["response"]["status_code"] for each in found] == [200, 400, 200, 200]
    assert found[1]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert len(found[2]["response"]["body"]["choices"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"], "nothing else is left"
    code, err = run(source, target)
    assert code == 2
    assert "is there already" in err
    assert run(source, target, "--overwrite")[0] == 1
    before = source.read_bytes()
    code, err = run(source, source, "--overwrite")
    assert code == 2
    assert "is the input itself" in err
    assert source.read_bytes() == before
    code, err = run(source, tmp_path, "--overwrite")
    assert code == 2
    assert "is a folder: name a file" in err


def test_lines_without_seed_follow_the_seed_of_the_command(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": "import ", "max_tokens": 12, "temperature": 1.5} for _ in range(2)))

    def texts(name: str, *arguments: str) -> list[str]:
        assert run(source, tmp_path / name, *arguments)[0] == 0
        return [each["response"]["body"]["choices"][0]["text"] for each in read(tmp_path / name)]

    vectors = write(tmp_path / "vectors.jsonl", {"input": "import os"}, url="/v1/embeddings")
    assert run(vectors, tmp_path / "vectors-out")[0] == 0, "they have no seed"
    first, again, other = texts("first"), texts("again", "--max-num-seqs", "1"), texts("other", "--seed", "1")
    assert first == again != other
    assert first[0] != first[1]


def test_whatever_ends_it_the_same_command_goes_on(tmp_path: Path) -> None:
    count = 60
    source = write(
        tmp_path / "in.jsonl", *({"prompt": f"def f{i}(", "max_tokens": 60, "ignore_eos": True, "seed": i} for i in range(count))
    )
    target, state = tmp_path / "out.jsonl", tmp_path / "out.jsonl.quire-batch"

    def answered() -> int:
        with closing(sqlite3.connect(f"file:{state / 'batches.db'}?mode=ro", uri=True)) as db:
            (found,) = db.execute("SELECT completed FROM batches").fetchone()
        return int(found)

    def begin() -> subprocess.Popen[str]:
        """Its engine stands still when some lines have been answered: they take 60 steps each, two at a time."""
        return start(source, target, "--max-num-seqs", "2", *STOPPING, **stops_after(100))

    def wait_for_answers(process: subprocess.Popen[str], more_than: int) -> int:
        """The engine's process, which stands still."""
        engine = stopped_engine(process.pid)
        wait_until(lambda: answered() > more_than, "lines are kept")
        return engine

    process = begin()
    engine = wait_for_answers(process, 0)
    second = start(source, target)
    assert "in use by another process" in second.communicate(timeout=DEADLINE_S)[1]
    assert second.returncode == 2
    process.send_signal(signal.SIGINT)
    with suppress(ProcessLookupError):  # its front may have ended it by now
        os.kill(engine, signal.SIGCONT)
    err = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 130
    first = answered()
    assert f"stopped; {first:,} of {count} lines are answered: the same command goes on from there" in err
    assert err.count("\n") == 1
    assert not target.exists()

    process = begin()
    engine = wait_for_answers(process, first)
    process.kill()
    os.kill(engine, signal.SIGCONT)
    process.communicate()
    wait_until(lambda: is_gone(engine), "the engine ends with its front")
    second_time = answered()
    assert first < second_time < count

    other = write(tmp_path / "other.jsonl", {"prompt": "x"})
    code, err = run(other, target)
    assert code == 2
    assert "is not the file that" in err
    code, err = run(source, target, "--served-model-name", "another")
    assert code == 2
    assert "answers of the model 'embedded'" in err

    process = begin()
    engine = wait_for_answers(process, second_time)
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: is_gone(engine), "it is dead")
    os.kill(stopped_engine(process.pid), signal.SIGCONT)
    assert process.wait(2 * DEADLINE_S) == 0
    assert f"{count} lines, 0 of them failed" in process.communicate()[1]
    found = read(target)
    assert [each["custom_id"] for each in found] == [f"id-{i}" for i in range(count)]
    assert all(each["response"]["status_code"] == 200 for each in found)
    assert not state.exists()


def test_wrong_use(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "gpt-5"}}\nwhat\n')
    (tmp_path / "no").write_text("a file")
    for found, code, words in (
        (run(tmp_path / "none", tmp_path / "out"), 2, "can't read"),
        (run(source, tmp_path / "no" / "out"), 2, "can't be written: Not a directory"),
        (
            run(source, tmp_path / "out"),
            1,
            "line 1: the model is 'embedded', and not 'gpt-5': see --served-model-name\n  line 2: the line is",
        ),
    ):
        assert found[0] == code
        assert words in found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "no"]
