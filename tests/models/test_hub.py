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
from safetensors.numpy import load_file, save_file

pytest.importorskip("quire.backends.cpu._native")

import quire
from quire.config import model_name
from quire.errors import ModelLoadError
from quire.models.weights import resolve_model
from quire.models.weights.hub import choose, is_name
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
    embedded_gguf(files / "code.UD-Q4_K_M.gguf", "Q4_0")  # by its name, which is all that is looked at
    embedded_gguf(files / "code.Q8_0.gguf", "Q8_0")
    shutil.copy(folder / "config.json", files)  # many such repositories have one
    (files / "mmproj-code.gguf").write_bytes(b"GGUF")
    shards = root / "org" / "shards"
    shutil.copytree(folder, shards)
    _split(shards)
    for name, change in {"strange": {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "without": {}}.items():
        shutil.copytree(folder, root / "org" / name)
        config = json.loads((folder / "config.json").read_text())
        (root / "org" / name / "config.json").write_text(json.dumps(config | change))
    (root / "org" / "without" / "tokenizer.json").unlink()
    for name, file in {"adapter": "adapter_config.json", "pickled": "pytorch_model.bin"}.items():
        (root / "org" / name).mkdir()
        (root / "org" / name / file).write_text("{}")
    server = Hub(root)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _split(folder: Path) -> None:
    """Into two files with names of their own."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    table = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: whole[name] for name in part}, folder / f"weights.safetensors-0000{i}.safetensors")
        table |= dict.fromkeys(part, f"weights.safetensors-0000{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


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


def test_what_others_left_of_a_model(hub: Hub, tmp_path: Path) -> None:
    """A cache with a part of the files, as transformers' configuration and tokenizer leave it, is completed."""
    whole = run(hub, tmp_path / "a", "org/shards")
    assert whole.returncode == 0, whole.stderr
    left = tmp_path / "a" / "hub" / "models--org--shards"
    shutil.rmtree(left / "trees", ignore_errors=True)  # older versions of the library write none
    (snapshot,) = left.glob("snapshots/*")
    for file in sorted(snapshot.glob("*.safetensors"))[1:]:
        file.unlink()
    again = run(hub, tmp_path / "a", "org/shards")
    assert (again.returncode, again.stdout) == (0, whole.stdout)
    assert run(hub, tmp_path / "a", "org/shards", offline=True).stdout == whole.stdout


def test_gguf_files(hub: Hub, tmp_path: Path) -> None:
    small = run(hub, tmp_path, "org/code-GGUF")
    assert small.returncode == 0, small.stderr
    assert [path.name for path in tmp_path.glob("hub/*/snapshots/*/*.gguf")] == ["code.UD-Q4_K_M.gguf"]
    large = run(hub, tmp_path, "org/code-GGUF:q8_0")
    assert large.returncode == 0, large.stderr
    before = len(hub.asked)
    for model, expected in (("org/code-GGUF", small), ("org/code-GGUF:Q8_0", large), ("hf.co/org/code-GGUF:UD-Q4_K_M", small)):
        assert run(hub, tmp_path, model).stdout == expected.stdout
    assert len(hub.asked) == before
    other = run(hub, tmp_path, "org/code-GGUF:Q6_K")
    assert other.returncode != 0
    assert "org/code-GGUF:Q6_K is not a folder or file here" in other.stderr
    assert "it has no such file (but code.Q8_0.gguf, code.UD-Q4_K_M.gguf)" in other.stderr
    for blob in tmp_path.glob("hub/models--org--code-GGUF/blobs/*"):
        blob.unlink()
    assert run(hub, tmp_path, "org/code-GGUF:Q8_0").stdout == large.stdout  # its link was there without a file


@pytest.mark.parametrize(("model", "offline", "part"), [
    ("org/none", False, "there is none, or it is shown to others only"),
    ("org/code@v9", False, "it has no revision 'v9'"),
    ("org/gated", False, "accept their terms on its page, and set HF_TOKEN"),
    ("org/code", True, "it was not downloaded before, and HF_HUB_OFFLINE is set"),
    ("models/-..x", False, "is not a folder or file here"),
    ("models/none.gguf", False, "there is no folder or file models/none.gguf"),
    ("org/code:Q8_0", False, "it has no GGUF files: leave :Q8_0 out"),
    ("org/strange", False, "architecture 'MambaForCausalLM' is not supported"),
    ("org/without", False, "it has no tokenizer.json"),
    ("org/adapter", False, "it holds an adapter"),
    ("org/pickled", False, "pickled weights can run code and are never loaded"),
])  # fmt: skip
def test_what_is_not_there(hub: Hub, tmp_path: Path, model: str, offline: bool, part: str) -> None:
    done = run(hub, tmp_path, model, offline=offline)
    assert done.returncode != 0
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.glob("hub/*/snapshots/*/*.safetensors"))  # nothing large is downloaded in vain


def test_names() -> None:
    for name in (
        "Qwen/Qwen3-0.6B", "org/a@v1.0", "org/a@refs/pr/1", "org/a-GGUF:UD-Q4_K_XL", "org/a@main:Q8_0", "https://huggingface.co/org/a",
        "hf.co/org/a:Q4_0",
    ):  # fmt: skip
        assert is_name(name)
    for name in ("a", "a/b/c", "/a/b", "./a/b", "../a", "a/b c", "~/a", "a/", "a/b:Q4 K", "a/b.gguf"):
        assert not is_name(name)


def test_which_file_is_taken() -> None:
    names = [
        "README.md", "a-Q4_K_M-00002-of-00002.gguf", "a-Q4_K_M-00001-of-00002.gguf", "a-Q8_0.gguf", "a-IQ4_K_M.gguf", "mmproj-f16.gguf",
        "a-Q4_K_M-imat-00001-of-00002.gguf", "a-Q4_K_M-imat-00002-of-00002.gguf", "b/a-Q8_0.gguf",
    ]  # fmt: skip
    parts = ["a-Q4_K_M-00001-of-00002.gguf", "a-Q4_K_M-00002-of-00002.gguf"]
    assert choose("o/a", names, None) == choose("o/a", names, "q4_k_m") == parts
    assert choose("o/a", names, "Q8_0") == ["a-Q8_0.gguf"]
    assert choose("o/a", ["x-BF16.gguf", "x-imatrix.gguf"], None) == ["x-BF16.gguf"]
    assert choose("o/a", ["x-F16.gguf", "x-BF16.gguf"], "f16") == ["x-F16.gguf"]
    for given, part in (
        (["README.md"], "neither safetensors nor GGUF"),
        (["mmproj.gguf"], "neither"),
        (["x-F16.gguf", "x-BF16.gguf"], r"it has several files \(x-F16.gguf, x-BF16.gguf\): name one"),
    ):
        with pytest.raises(ModelLoadError, match=part):
            choose("o/a", given, None)
    with pytest.raises(ModelLoadError, match=r"it has no such file \(but"):
        choose("o/a", names, "Q4_K")
