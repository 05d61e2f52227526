"""/v1/files and /v1/batches through the official client, on a fake backend: their shapes, their errors, whose they are."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire.server.http.keys import read_keys
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Server, http, wait_clean, wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ALICE, BOB = "sk-alice-0123456789", "sk-bob-01234567890"


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> str:
    fields: dict[str, Any] = {"prompt": f"x{custom_id} =", "max_tokens": 4, "ignore_eos": True} if url == COMPLETIONS else {}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": fields | body})


def parsed(text: str) -> list[Any]:
    return [json.loads(each) for each in text.splitlines()]


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("batches")
    server = Server(
        tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), batch_dir=str(folder), max_file_bytes=200_000, max_body_bytes=20_000,
        max_num_seqs=8, max_waiting=4,
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as client:
        yield client


def upload(client: openai.OpenAI, *lines: str, name: str = "in.jsonl") -> str:
    return client.files.create(file=(name, "\n".join(lines).encode()), purpose="batch").id


def ended(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    batch = client.batches.retrieve(batch_id)

    def look() -> bool:
        nonlocal batch
        batch = client.batches.retrieve(batch_id)
        return batch.status in ("failed", "completed", "expired", "cancelled")

    wait_until(look, "the batch has ended")
    return batch


def run(client: openai.OpenAI, *lines: str, endpoint: Any = COMPLETIONS, **fields: Any) -> openai.types.Batch:
    made = client.batches.create(input_file_id=upload(client, *lines), endpoint=endpoint, completion_window="24h", **fields)
    return ended(client, made.id)


def results(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    return parsed(client.files.content(file_id).text)


def test_files(client: openai.OpenAI, server: Server) -> None:
    content = "é\n" * 1000
    file = client.files.create(file=("../../etc/passwd", content.encode()), purpose="batch")
    assert (file.object, file.bytes, file.purpose, file.status) == ("file", 3000, "batch", "processed")
    assert file.filename == "passwd", "a name to show, and no path"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read().decode() == content
    assert file in client.files.list().data
    assert client.files.list(purpose="batch_output").data == []
    other = client.files.create(file=("b", b""), purpose="batch")
    assert other.bytes == 0
    assert [each.id for each in client.files.list(order="asc", limit=1)][-2:] == [file.id, other.id], "the client turns the pages itself"
    assert [each.id for each in client.files.list(limit=1)][:2] == [other.id, file.id]
    for each in (file, other):
        assert client.files.delete(each.id).deleted
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            client.files.retrieve(each.id)


def test_a_filename_is_shown_and_never_trusted(server: Server, client: openai.OpenAI) -> None:
    """As other clients than httpx may send it."""
    for sent, kept in ((b"C:\\x\\a\x01b\x1b[2J.jsonl", "ab[2J.jsonl"), (b"../..", ".."), (b"", "upload.jsonl"), (b"x" * 3000, "x" * 255)):
        body = b'--q\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        body += b'--q\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n{}\r\n--q--\r\n' % sent
        answer = http.post(server.url + "/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=q"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["filename"] == kept
        client.files.delete(answer.json()["id"])


def test_uploads_that_are_refused(server: Server, client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    def send(**parts: Any) -> httpx.Response:
        return http.post(server.url + "/v1/files", **parts)

    file = {"file": ("a", b"x")}
    for parts, status, words in (
        ({"json": {}}, 415, "multipart/form-data"),
        ({"files": file}, 400, "purpose must be 'batch', got null"),
        ({"files": file, "data": {"purpose": "assistants"}}, 400, "got \"assistants\""),
        ({"files": file, "data": {"purpose": "batch", "expires_after[seconds]": "3600"}}, 400, "expires_after[seconds] is not supported"),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, 400, "two files"),
        ({"files": {"nofile": ("a", b"x" * 2000)}, "data": {"purpose": "batch"}}, 400, "more than 1,024 bytes"),
        ({"files": file | {"purpose": (None, b"x" * 10), "": (None, b"")}}, 400, "unexpected field"),
        ({"files": {"file": ("a", b"x" * 200_001)}, "data": {"purpose": "batch"}}, 413, "more than 200,000 bytes"),
        ({"files": {"file": ("a", b"x" * 2_000_000)}, "data": {"purpose": "batch"}}, 413, "more than 200,000 bytes"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "the form ends before"),
        ({"content": b"what", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "not valid multipart"),
        ({"content": b"--x\r\n" + b"a" * 9000, "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, ""),
    ):  # fmt: skip
        answer = send(**parts)
        assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text
    assert not caplog.records, "whoever sends rubbish does not fill the log"
    assert client.files.list().data == []
    assert list((Path(server.config.batch_dir or "") / "files").iterdir()) == [], "nothing of it was kept"
    assert client.files.create(file=("a", b"x" * 200_000), purpose="batch").bytes == 200_000


def test_a_batch(client: openai.OpenAI, server: Server) -> None:
    """Two endpoints' worth of lines; each is answered as the same request over HTTP, the failed ones in a file of their own."""
    lines = [line(str(i), seed=i, temperature=1) for i in range(20)]
    lines[7] = line("long", max_tokens=5000)
    lines[11] = line("typo", temprature=1)
    batch = run(client, *lines, "", metadata={"for": "me"})
    assert batch.status == "completed"
    assert batch.errors is None
    assert batch.metadata == {"for": "me"}
    assert batch.model == "fake"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 18, 2)
    assert all((batch.in_progress_at, batch.finalizing_at, batch.completed_at))
    assert batch.expires_at == batch.created_at + 86400
    good, bad = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert [each["custom_id"] for each in good] == [str(i) for i in range(20) if i not in (7, 11)], "in the order of the input"
    assert [each["custom_id"] for each in bad] == ["long", "typo"]
    assert len({each["id"] for each in good + bad}) == 20
    for each in good:
        assert each["response"]["status_code"] == 200
        assert each["response"]["request_id"].startswith("req-")
        assert each["error"] is None
        direct = http.post(server.url + COMPLETIONS, json=json.loads(lines[int(each["custom_id"])])["body"]).json()
        assert each["response"]["body"]["choices"] == direct["choices"]
    assert bad[0]["response"]["status_code"] == 400
    assert bad[0]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert "did you mean temperature" in bad[1]["response"]["body"]["error"]["message"]
    assert batch.usage is not None
    assert batch.usage.output_tokens == 18 * 4
    assert batch.usage.input_tokens == sum(each["response"]["body"]["usage"]["prompt_tokens"] for each in good)
    files = {file.id: file for file in client.files.list(purpose="batch_output")}
    assert files[batch.output_file_id or ""].filename == f"{batch.id}_output.jsonl"
    assert client.batches.retrieve(batch.id) == batch
    wait_clean(server.url)


def test_a_batch_of_chats(client: openai.OpenAI) -> None:
    batch = run(client, line("a", CHAT, messages=[{"role": "user", "content": "é"}], max_tokens=3, n=2), endpoint=CHAT)
    (answer,) = results(client, batch.output_file_id)
    assert [choice["finish_reason"] for choice in answer["response"]["body"]["choices"]] == ["length", "length"]
    assert batch.error_file_id is None


def test_a_byte_order_mark_is_no_part_of_the_first_line(client: openai.OpenAI) -> None:
    """As editors on Windows write it."""
    batch = run(client, "\ufeff" + line("a") + "\r\n" + line("b"))
    assert [answer["custom_id"] for answer in results(client, batch.output_file_id)] == ["a", "b"]


@pytest.mark.parametrize(("text", "errors"), [
    ("", [("empty_file", None, "no lines")]),
    ("\n  \n", [("empty_file", None, "no lines")]),
    ("{\n" + line("a") + "\n[]\n\xff", [("invalid_json_line", 1, "not a JSON object"), ("invalid_json_line", 3, "a list"),
                                     ("invalid_json_line", 4, "not a JSON object")]),
    (line("a") + "\n\n" + line("b") + "\n" + line("a"), [("duplicate_custom_id", 4, 'the custom_id "a" is that of line 1')]),
    (line("a", CHAT), [("invalid_url", 1, "url must be /v1/completions, got")]),
    (line("a").replace("POST", "GET"), [("invalid_method", 1, "method must be 'POST'")]),
    (line("a").replace("body", "boby"), [("missing_required_parameter", 1, "body is missing")]),
    (line("a").replace('"url"', '"more": 1, "url"'), [("unknown_parameter", 1, "unknown field 'more'")]),
    (line("a").replace('"a"', "7"), [("invalid_custom_id", 1, "got 7")]),
    (line("a", stream=True), [("invalid_body", 1, "stream is not possible")]),
    (line("a", model="gpt-5"), [("model_not_found", 1, "'gpt-5' does not exist")]),
    (line("a", model=5), [("invalid_body", 1, "model must be a string")]),
    (line("a") + "\n" + line("b", prompt="x" * 20_000) + "\n" + line("a"),
     [("line_too_long", 2, "more than 20,000 bytes"), ("duplicate_custom_id", 3, "line 1")]),
    ("{\n" * 150, [("invalid_json_line", i, "") for i in range(1, 101)] + [("more_errors", None, "50 more")]),
])  # fmt: skip
def test_files_that_are_no_batches(text: str, errors: list[Any], client: openai.OpenAI) -> None:
    file = client.files.create(file=("in", text.encode("latin-1")), purpose="batch")
    batch = ended(client, client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h").id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at
    assert batch.errors is not None
    found = batch.errors.data or []
    assert [(error.code, error.line) for error in found] == [(code, number) for code, number, _ in errors]
    for error, (_, _, words) in zip(found, errors, strict=True):
        assert words in (error.message or "")


def test_batches_that_are_refused(client: openai.OpenAI, server: Server) -> None:
    right = {"input_file_id": upload(client, line("a")), "endpoint": COMPLETIONS, "completion_window": "24h"}
    for wrong, status, param in (
        ({"input_file_id": "file-none"}, 404, "file_id"),
        ({"input_file_id": 5}, 400, "input_file_id"),
        ({"endpoint": "/v1/files"}, 400, "endpoint"),
        ({"completion_window": "1 week"}, 400, "completion_window"),
        ({"completion_window": "721h"}, 400, "completion_window"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
        ({"metadata": {"a": "x" * 513}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, 400, "output_expires_after"),
        ({"endpont": "x"}, 400, "endpont"),
    ):
        answer = http.post(server.url + "/v1/batches", json=right | wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    done = run(client, line("a"))
    output = {"input_file_id": done.output_file_id}
    assert "has the purpose 'batch_output'" in http.post(server.url + "/v1/batches", json=right | output).json()["error"]["message"]
    assert http.get(server.url + "/v1/batches/batch_none").status_code == 404
    assert http.get(server.url + "/v1/batches?limit=0").status_code == 400
    assert http.get(server.url + "/v1/files?order=up").status_code == 400
    assert http.get(server.url + "/v1/files?after=nobody").status_code == 404
    with pytest.raises(openai.BadRequestError, match="has ended"):
        client.batches.cancel(done.id)


def test_cancel_and_pages(client: openai.OpenAI, server: Server) -> None:
    """What runs is ended at once; every line is accounted for. The input can't go before."""
    server.backend.go_for(20)
    try:
        file = upload(client, *(line(str(i), max_tokens=200) for i in range(30)))
        made = client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h")
        wait_until(lambda: (client.batches.retrieve(made.id).request_counts or made.request_counts).total == 30, "it runs")  # type: ignore[union-attr]
        wait_until(lambda: server.client.in_background > 0, "lines are in flight")
        with pytest.raises(openai.BadRequestError, match="still reads the file"):
            client.files.delete(file)
        assert client.batches.cancel(made.id).status == "cancelling"
        server.backend.go_on()
        batch = ended(client, made.id)
    finally:
        server.backend.go_on()
    assert batch.status == "cancelled"
    assert batch.cancelling_at
    assert batch.cancelled_at
    assert batch.request_counts is not None
    bad = results(client, batch.error_file_id)
    assert len(bad) == 30 - batch.request_counts.completed
    assert bad[-1]["response"] is None
    assert bad[-1]["error"]["code"] == "batch_cancelled"
    wait_clean(server.url)
    assert server.client.in_flight == server.client.in_background == 0
    assert client.files.delete(file).deleted
    others = [run(client, line("a")).id for _ in range(3)]
    assert [each.id for each in client.batches.list(limit=2)][:4] == [*reversed(others), made.id], "the newest first, page by page"


def test_a_restart_goes_on_and_a_window_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What has an answer keeps it, what was in flight is run again, and what is left when the window ends is said to be."""

    def start() -> tuple[Server, openai.OpenAI]:
        backend = PacedBackend(vocab_size=tokenizer.vocab_size)
        backend.go.clear()
        server = Server(tokenizer, backend, batch_dir=str(tmp_path), batch_concurrency=2)
        return server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=DEADLINE_S, max_retries=0)

    def counts(batch: openai.types.Batch) -> tuple[int, int, int]:
        assert batch.request_counts is not None
        return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed

    def answer_some(more_than: int) -> None:
        server.backend.go_for(100)  # of 20 tokens each, two at a time
        wait_until(lambda: counts(client.batches.retrieve(made.id))[1] > more_than, "some are answered")
        server.backend.delay_s = 0.05  # while it stops
        assert server.client.in_background <= 2

    server, client = start()
    file = upload(client, *(line(str(i), max_tokens=20) for i in range(200)))
    made = client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="2h")
    answer_some(2)
    server.stop()
    server, client = start()
    first = counts(client.batches.retrieve(made.id))[1]
    assert 3 <= first < 200, "it was stopped before it was done, and forgot nothing"
    answer_some(first)
    server.stop()
    with sqlite3.connect(tmp_path / "batches.db") as db:
        assert db.execute("SELECT expires_at - created_at FROM batches").fetchone() == (7200,)
        db.execute("UPDATE batches SET expires_at = ?", (int(time.time()),))
    server, client = start()
    batch = ended(client, made.id)
    assert batch.status == "expired"
    assert batch.expired_at
    good, bad = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert first < len(good) < 200
    assert sorted(int(each["custom_id"]) for each in good + bad) == list(range(200))
    assert {each["error"]["code"] for each in bad} == {"batch_expired"}
    server.stop()


def test_without_a_folder(fake: Server) -> None:
    for path in ("/v1/files", "/v1/batches", "/v1/files/file-a/content"):
        answer = http.get(fake.url + path)
        assert answer.status_code == 404
        assert "--batch-dir" in answer.json()["error"]["message"]


def test_each_key_sees_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[alice]\nkey = "{ALICE}"\n[bob]\nkey = "{BOB}"\nrequests_per_minute = 1\nmax_concurrent = 1\n')
    keys.chmod(0o600)
    backend = PacedBackend(vocab_size=tokenizer.vocab_size)
    server = Server(tokenizer, backend, keys=read_keys(str(keys)), batch_dir=str(tmp_path / "store"))
    try:
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key=ALICE, timeout=DEADLINE_S, max_retries=0) as alice,
            openai.OpenAI(base_url=server.url + "/v1", api_key=BOB, timeout=DEADLINE_S, max_retries=0) as bob,
        ):
            batch = run(bob, *(line(str(i), prompt="the same beginning " * 30, seed=1) for i in range(4)))
            assert batch.status == "completed", "a key's limits are for live requests"
            cached = [each["response"]["body"]["usage"]["prompt_tokens_details"] for each in results(bob, batch.output_file_id)]
            assert any(each["cached_tokens"] for each in cached), "its lines share prefixes"
            live = http.post(server.url + COMPLETIONS, json={"prompt": "the same beginning " * 30, "max_tokens": 1},
                             headers={"authorization": f"Bearer {ALICE}"}).json()  # fmt: skip
            assert live["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "and with nobody else"
            assert alice.batches.list().data == []
            assert alice.files.list().data == []
            for look in (
                lambda: alice.batches.retrieve(batch.id), lambda: alice.batches.cancel(batch.id),
                lambda: alice.batches.list(after=batch.id),
                lambda: alice.files.retrieve(batch.input_file_id), lambda: alice.files.content(batch.output_file_id or ""),
                lambda: alice.files.delete(batch.input_file_id),
                lambda: alice.batches.create(input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h"),
            ):  # fmt: skip
                with pytest.raises(openai.NotFoundError):
                    look()
            assert len(bob.files.list().data) == 2
        assert http.get(server.url + "/v1/files").status_code == 401
    finally:
        server.stop()
