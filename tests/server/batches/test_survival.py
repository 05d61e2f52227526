"""Batches behind a real ``quire serve``: killed processes, full disks, live requests beside them. Every line is answered once."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from quire.errors import ConfigError
from quire.server.batches.records import StorageError, StoreInUseError
from quire.server.batches.store import Store
from server.harness import DEADLINE_S, Process, generated, health, http, is_gone, start_process, wait_clean, wait_until

COMPLETIONS = "/v1/completions"


@contextmanager
def serving(folder: Path, *arguments: str, stop_after: int | None = None) -> Iterator[Process]:
    process = Process("--kv-memory", "32MiB", "--batch-dir", str(folder), *arguments, stop_after=stop_after)
    try:
        yield process
    finally:
        process.kill()


@contextmanager
def client_of(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:
        yield client


def lines(count: int, **fields: Any) -> bytes:
    bodies = [{"prompt": f"def f{i}(", "max_tokens": 30, "ignore_eos": True, "seed": i} | fields for i in range(count)]
    each = ({"custom_id": f"id-{i}", "method": "POST", "url": COMPLETIONS, "body": body} for i, body in enumerate(bodies))
    return b"".join(json.dumps(one).encode() + b"\n" for one in each)


def begin(client: openai.OpenAI, content: bytes) -> str:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h").id


def completed(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed


def results(client: openai.OpenAI, batch_id: str) -> list[Any]:
    wait_until(lambda: client.batches.retrieve(batch_id).status == "completed", "the batch has ended")
    batch = client.batches.retrieve(batch_id)
    assert batch.error_file_id is None
    return [json.loads(line) for line in client.files.content(batch.output_file_id or "").text.splitlines()]


def test_both_processes_killed_at_any_moment(tmp_path: Path) -> None:
    """The engine, then the front and the engine at once; each line is answered once, in order, with the bytes of an undisturbed run."""
    rng, count = random.Random(5), 60
    content = lines(count)
    with serving(tmp_path / "calm") as server, client_of(server) as client:
        calm = results(client, begin(client, content))
    with serving(tmp_path / "store") as server, client_of(server) as client:
        batch_id = begin(client, content)  # validated by whoever comes next, as it may be
        server.process.kill()
    seen = 0
    for kill_engine_first in (False, True, False):
        # Lines of 30 steps, four at a time: some are answered when the engine stops, and some are begun.
        with serving(tmp_path / "store", "--max-num-seqs", "4", stop_after=rng.randint(35, 95)) as server, client_of(server) as client:
            now = killed(server, client, batch_id, seen, kill_engine_first)
            assert seen < now < count, "there was something left to lose"
            seen = now
    with serving(tmp_path / "store") as server, client_of(server) as client:
        disturbed = results(client, batch_id)
        counts = client.batches.retrieve(batch_id).request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (count, count, 0)
        wait_clean(server.url)
    assert [each["custom_id"] for each in disturbed] == [f"id-{i}" for i in range(count)]
    assert [each["response"]["body"]["choices"] for each in disturbed] == [each["response"]["body"]["choices"] for each in calm]


def killed(server: Process, client: openai.OpenAI, batch_id: str, seen: int, kill_engine_first: bool) -> int:
    """Kill both processes in the middle of it, when more than ``seen`` lines are answered. How many were by then."""
    engine = server.wait_stopped()
    wait_until(lambda: completed(client, batch_id) > seen, "it goes on")
    if kill_engine_first:
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: is_gone(engine), "it is dead")
        engine = server.wait_stopped()
    now = completed(client, batch_id)
    server.process.kill()
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: is_gone(engine), "both are dead")
    return now


def test_every_endpoint_answers_in_the_background(tmp_path: Path) -> None:
    """As over HTTP; where live requests alone would be refused, none of the lines is."""
    text = {"role": "user", "content": "import os"}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [text], "max_tokens": 4, "seed": 1},
        "/v1/completions": {"prompt": ["import os", "def f("], "max_tokens": 4, "seed": 1, "n": 2},
        "/v1/embeddings": {"input": ["import os", "def f("]},
        "/v1/responses": {"input": "import os", "max_output_tokens": 4, "temperature": 0},
    }
    taken = {"id", "created", "created_at", "completed_at", "usage", "timings", "metrics"}
    with serving(tmp_path, "--max-num-seqs", "1", "--max-waiting", "1") as server, client_of(server) as client:
        for endpoint, body in bodies.items():
            made = [{"custom_id": f"{i}", "method": "POST", "url": endpoint, "body": body} for i in range(4)]
            file = client.files.create(file=("in", "\n".join(map(json.dumps, made)).encode()), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")  # type: ignore[arg-type]
            answers = [each["response"]["body"] for each in results(client, batch.id)]
            direct = http.post(server.url + endpoint, json=body)
            assert direct.status_code == 200, direct.text
            for answer in answers:
                assert known(answer, taken) == known(direct.json(), taken)
        wait_clean(server.url)


def test_lines_have_all_the_time_and_a_stop_does_not_wait_for_them(tmp_path: Path) -> None:
    """The time limit of live requests is not theirs, since they wait for those; neither is draining."""
    arguments = ("--max-num-seqs", "1", "--request-timeout", "1", "--drain-timeout", "3600")
    with serving(tmp_path, *arguments, stop_after=50) as server, client_of(server) as client:
        batch_id = begin(client, lines(1, max_tokens=100))
        server.wait_stopped()
        time.sleep(1.5)  # longer than a live request would get
        server.go_on()
        (only,) = results(client, batch_id)
        assert only["response"]["body"]["usage"]["completion_tokens"] == 100
        batch_id = begin(client, lines(200, max_tokens=1900))
        before = generated(server.url)
        wait_until(lambda: generated(server.url) > before, "it runs")
        assert server.stop(signal.SIGTERM) == (0, "")
    with serving(tmp_path) as server, client_of(server) as client:
        assert client.batches.cancel(batch_id).status == "cancelling", "it is still there, and goes on"


def known(value: Any, taken: set[str]) -> Any:
    """Without what is different in every answer."""
    if isinstance(value, dict):
        return {name: known(each, taken) for name, each in value.items() if name not in taken}
    return [known(each, taken) for each in value] if isinstance(value, list) else value


def test_live_requests_come_before_all_lines_and_are_not_refused_for_them(tmp_path: Path) -> None:
    """A batch that fills every row; a queue that holds one live request beside the running ones."""
    with serving(tmp_path, "--max-num-seqs", "4", "--max-waiting", "1", "--batch-concurrency", "32") as server, client_of(server) as client:
        batch_id = begin(client, lines(400, max_tokens=1900))  # for longer than anybody waits here; it is cancelled
        wait_until(lambda: health(server.url).get("running") == 4, "its lines run")
        for i in range(3):
            answer = http.post(server.url + COMPLETIONS, json={"prompt": f"import {i}", "max_tokens": 4, "ignore_eos": True})
            assert answer.status_code == 200, answer.text
        assert completed(client, batch_id) < 400, "they did not wait for the batch"
        wait_until(lambda: health(server.url).get("preemptions", 0) > 0, "its lines made way")  # the engine says so once a second
        assert client.batches.cancel(batch_id).status == "cancelling"
        wait_clean(server.url)


def test_a_full_disk_stops_batches_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files is a disk that fills up; then there is room again."""
    with serving(tmp_path, "--max-num-seqs", "4", stop_after=150) as server, client_of(server) as client:
        limit = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        batch_id = begin(client, lines(40, max_tokens=100))
        wait_until(lambda: completed(client, batch_id) > 0, "it runs")
        server.wait_stopped()
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4096, limit[1]))
        server.go_on()
        refused = http.post(server.url + "/v1/files", files={"file": ("a", b"x" * 100_000)}, data={"purpose": "batch"})
        assert refused.status_code == 507
        assert refused.json()["error"]["code"] == "storage_failed"
        assert str(tmp_path) not in refused.text
        wait_until(lambda: health(server.url).get("running") == 0, "its lines wait to be kept")
        before = completed(client, batch_id)
        live = http.post(server.url + COMPLETIONS, json={"prompt": "import os", "max_tokens": 4})
        assert live.status_code == 200, "live requests need no disk"
        assert completed(client, batch_id) == before < 40
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limit)
        found = results(client, batch_id)
        assert [each["custom_id"] for each in found] == [f"id-{i}" for i in range(40)]
        assert len(client.files.list().data) == 2
        code, err = server.stop()
        assert code == 0
        assert "can't be written" in err
        assert "Traceback" not in err


def test_a_disk_that_is_away_for_a_moment(tmp_path: Path) -> None:
    """What can't be read now is read later; a batch can be cancelled meanwhile."""
    with serving(tmp_path / "store") as server, client_of(server) as client:
        files = [client.files.create(file=("in.jsonl", lines(3)), purpose="batch") for _ in range(2)]
        for file in files:
            (tmp_path / "store" / "files" / file.id).rename(tmp_path / file.id)
        one, other = (client.batches.create(input_file_id=f.id, endpoint=COMPLETIONS, completion_window="24h").id for f in files)
        time.sleep(1)  # they are tried
        client.batches.cancel(other)
        wait_until(lambda: client.batches.retrieve(other).status == "cancelled", "it ends without its input")
        (tmp_path / files[0].id).rename(tmp_path / "store" / "files" / files[0].id)
        assert len(results(client, one)) == 3
        _, err = server.stop()
    assert "waits until its files can be read" in err
    assert "Traceback" not in err


def refused(*arguments: str) -> str:
    process = start_process("--port", "0", *arguments)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (2, ""), err
    assert err.count("\n") == 1, err
    return err


def test_folders_that_can_not_be_used(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    with pytest.raises(StoreInUseError, match=f"in use by another process \\({os.getpid()}\\)"):
        Store(tmp_path / "a")
    assert "in use by another process" in refused("--batch-dir", str(tmp_path / "a"))
    store.close()
    Store(tmp_path / "a").close()
    (tmp_path / "file").write_text("")
    assert "can't be written: Not a directory" in refused("--batch-dir", str(tmp_path / "file" / "b"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "batches.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match="not a database"):
        Store(tmp_path / "c")
    import sqlite3

    with sqlite3.connect(tmp_path / "a" / "batches.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="another version of Quire"):
        Store(tmp_path / "a")


READ_ONLY = """
import os, sys
from pathlib import Path
from quire.errors import ConfigError
from quire.server.batches.store import Store
os.getuid() or os.setuid(65534)  # root may write everywhere
try:
    Store(Path(sys.argv[1]))
except ConfigError as e:
    print(e.message)
"""


def test_a_folder_that_is_read_only() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Store(folder).close()
        for path in (folder, folder / "files"):
            path.chmod(0o555)
        try:
            found = subprocess.run([sys.executable, "-c", READ_ONLY, name], capture_output=True, text=True, check=True)
        finally:
            for path in (folder, folder / "files"):
                path.chmod(0o755)
    assert "can't be written: Permission denied" in found.stdout


def test_a_file_that_can_not_be_written_down_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (written := store.new_path()).write_bytes(b"abc")
    store._db.execute("DROP TABLE files")
    with pytest.raises(StorageError):
        store.add_file(written, "", "a", "batch")
    store.close()
    assert not list((tmp_path / "files").iterdir())


def test_a_damaged_store_ends_the_start_in_one_line(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "batches.db") as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'batches'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    with open(tmp_path / "batches.db", "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    process = start_process("--port", "0", "--batch-dir", str(tmp_path))
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"quire: {tmp_path / 'batches.db'} can't be read ("), err
    assert err.count("\n") == 1


def test_what_others_keep_in_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "files" / "new-folder").mkdir(parents=True)
    (tmp_path / "files" / "thesis.tex").write_text("mine")
    (tmp_path / "files" / "file-1").write_text("mine too")
    Store(tmp_path).close()
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["file-1", "new-folder", "thesis.tex"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (written := store.new_path()).write_bytes(b"abc")
    file = store.add_file(written, "", "a", "batch")
    store.new_path().write_bytes(b"half an upload")
    store.path(f"file-{'0' * 24}").write_bytes(b"half a result")
    store.close()
    store = Store(tmp_path)
    assert [path.name for path in (tmp_path / "files").iterdir()] == [file.id]
    store.close()
