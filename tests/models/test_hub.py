"""Names of the Hugging Face Hub: a Hub on this machine, of which models are downloaded and then found without it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("quire.backends.cpu._native")

import quire
from quire.config import model_name
from quire.errors import ModelLoadError
from quire.models.weights import resolve_model
from quire.models.weights.hub import NAME, choose
from sample_gguf import embedded_gguf

COMMIT = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """What huggingface_hub asks of the Hub, for folders ``org/name`` under a root."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []
        """Of each request its path."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.server.root / "/".join(parts[2:4])
            if "gated" in folder.name:
                return self._send(403, b"{}", with_body, {"X-Error-Code": "GatedRepo"})
            if not folder.is_dir():
                return self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
            if "revision" in parts and parts[-1] not in ("main", COMMIT):
                return self._send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            names = [file.relative_to(folder).as_posix() for file in files]
            if "tree" in parts:
                found: object = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
                    for name, file in zip(names, files, strict=True)
                ]
            else:
                repo = "/".join(parts[2:4])
                found = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": [{"rfilename": name} for name in names]}
            return self._send(200, json.dumps(found).encode(), with_body, {"content-type": "application/json"})
        if "resolve" in parts:
            at = parts.index("resolve")
            data = (self.server.root / "/".join(parts[:at]) / "/".join(parts[at + 2 :])).read_bytes()
            return self._send(200, data, with_body, {"etag": f'"{hashlib.sha1(data).hexdigest()}"', "x-repo-commit": COMMIT})
        return self._send(404, b"{}", with_body, {})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    folder = root / "org" / "code"
    folder.mkdir(parents=True)
    for file in resolve_model("embedded").iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder)
    (folder / "consolidated.safetensors").write_bytes(b"the same again, in another format")
    files = root / "org" / "code-GGUF"
    files.mkdir()
    embedded_gguf(files / "code.Q4_0.gguf", "Q4_0")
    embedded_gguf(files / "code.Q8_0.gguf", "Q8_0")
    server = Hub(root)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub: Hub, home: Path, model: str, *, offline: bool = False, command: str = "run") -> subprocess.CompletedProcess[str]:
    """``quire run MODEL`` (the Hub's library reads its variables when it is imported)."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(Path(quire.__file__).parents[1]), "HF_TOKEN": ""}
    options = ["-p", "def main():", "--max-tokens", "4", "--kv-memory", "16MiB"] if command == "run" else ["--machine", "h100"]
    return subprocess.run(
        [sys.executable, "-P", "-m", "quire.cli.main", command, model, *options], capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | variables | ({"HF_HUB_OFFLINE": "1"} if offline else {}),
    )  # fmt: skip


def test_a_folder(hub: Hub, tmp_path: Path) -> None:
    """Downloaded once, without what holds the weights again; then nobody is asked."""
    planned = run(hub, tmp_path, "org/code", command="plan")
    assert planned.returncode == 0, planned.stderr
    assert not any("safetensors" in path for path in hub.asked)
    first = run(hub, tmp_path, "org/code")
    assert first.returncode == 0, first.stderr
    assert "org/code is not there yet: asking the Hugging Face Hub" in first.stderr
    assert first.stdout.startswith("def main():")
    assert not any("consolidated" in path for path in hub.asked)
    before = len(hub.asked)
    for offline in (False, True):
        again = run(hub, tmp_path, "org/code", offline=offline)
        assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert len(hub.asked) == before
    (snapshot,) = tmp_path.glob("hub/models--org--code/snapshots/*")
    assert model_name(snapshot) == "org/code"


def test_gguf_files(hub: Hub, tmp_path: Path) -> None:
    small = run(hub, tmp_path, "org/code-GGUF")
    assert small.returncode == 0, small.stderr
    assert [path.name for path in tmp_path.glob("hub/*/snapshots/*/*.gguf")] == ["code.Q4_0.gguf"]
    large = run(hub, tmp_path, "org/code-GGUF:q8_0")
    assert large.returncode == 0, large.stderr
    before = len(hub.asked)
    for model, expected in (("org/code-GGUF", small), ("org/code-GGUF:Q8_0", large)):
        assert run(hub, tmp_path, model).stdout == expected.stdout
    assert len(hub.asked) == before
    other = run(hub, tmp_path, "org/code-GGUF:Q6_K")
    assert other.returncode != 0
    assert "org/code-GGUF:Q6_K is not a folder or file here" in other.stderr
    assert "it has no such file (but code.Q4_0.gguf, code.Q8_0.gguf)" in other.stderr


@pytest.mark.parametrize(("model", "offline", "part"), [
    ("org/none", False, "there is none, or it is shown to others only"),
    ("org/code@v9", False, "it has no revision 'v9'"),
    ("org/gated", False, "accept their terms on its page, and set HF_TOKEN"),
    ("org/code", True, "it can't be downloaded ("),
    ("models/-..x", False, "is not a folder or file here"),
])  # fmt: skip
def test_what_is_not_there(hub: Hub, tmp_path: Path, model: str, offline: bool, part: str) -> None:
    done = run(hub, tmp_path, model, offline=offline)
    assert done.returncode != 0
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_names() -> None:
    for name in ("Qwen/Qwen3-0.6B", "org/a@v1.0", "org/a@refs/pr/1", "org/a-GGUF:Q4_K_M", "org/a@main:Q8_0"):
        assert NAME.fullmatch(name)
    for name in ("a", "a/b/c", "/a/b", "./a/b", "../a", "a/b c", "~/a", "a/", "a/b:Q4 K"):
        assert not NAME.fullmatch(name)


def test_which_file_is_taken() -> None:
    names = [
        "README.md",
        "a-Q4_K_M-00002-of-00002.gguf",
        "a-Q4_K_M-00001-of-00002.gguf",
        "a-Q8_0.gguf",
        "a-IQ4_K_M.gguf",
        "mmproj-f16.gguf",
    ]
    parts = ["a-Q4_K_M-00001-of-00002.gguf", "a-Q4_K_M-00002-of-00002.gguf"]
    assert choose("o/a", names, None) == choose("o/a", names, "q4_k_m") == parts
    assert choose("o/a", names, "Q8_0") == ["a-Q8_0.gguf"]
    assert choose("o/a", ["x-F16.gguf", "x-BF16.gguf"], None) == ["x-BF16.gguf"]
    assert choose("o/a", ["x-F16.gguf", "x-BF16.gguf"], "f16") == ["x-F16.gguf"]
    for given, part in ((["README.md"], "neither config.json and safetensors nor GGUF"), (["mmproj.gguf"], "neither")):
        with pytest.raises(ModelLoadError, match=part):
            choose("o/a", given, None)
    with pytest.raises(ModelLoadError, match=r"it has no such file \(but"):
        choose("o/a", names, "Q4_K")
