"""benchmarks/peers.py: turns and figures on made-up engines, the GGUF writer, and Quire itself on the embedded model."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.models.weights import load_model
from sample_models import GPT_OSS, LLAMA, checkpoint, write_model, write_safetensors
from sample_packed import packed_folder
from server.harness import is_gone, state_of, wait_until

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # scripts, no package

import peers  # noqa: E402
from peer_engines import gguf, measure, report, served  # noqa: E402
from peer_engines.process import Answer, Child, PeerFailed  # noqa: E402

NOWHERE = ["--vllm-python", "/nowhere/python", "--transformers-python", "/nowhere/python", "--llama-server", "/nowhere/llama-server"]


class MadeUp:
    """Takes as long as it says, and writes down what happens to it."""

    def __init__(self, name: str, seconds: list[float], log: list[str], outputs: int = 1) -> None:
        self.name, self.settings = name, {"command": f"{name} --fast"}
        self._seconds, self._log, self._output = iter(seconds), log, outputs

    def _note(self, what: str) -> None:
        self._log.append(f"{self.name} {what}")

    def start(self) -> None:
        self._note("start")

    def run(self, requests: list[tuple[list[int], int]]) -> Answer:
        if len(requests) == len(measure.WARM_UP):
            return Answer(1.0, requests, [[0]] * len(requests))
        self._note("run")
        if (seconds := next(self._seconds)) < 0:
            raise PeerFailed(f"{self.name} broke")
        return Answer(seconds, requests, [[self._output] * length for _, length in requests])

    def hold(self) -> None:
        self._note("hold")

    def release(self) -> None:
        self._note("release")

    def stop(self) -> None:
        self._note("stop")


def test_engines_take_turns_and_the_median_counts() -> None:
    log: list[str] = []
    engines = [MadeUp("quire", [1, 4, 2], log), MadeUp("slow", [4, 4, 8], log, outputs=2)]
    records = measure.measure(engines, measure.Throughput([(5, 30), (7, 10)]), 3, 100)
    turns = [line.split()[0] for line in log if line.endswith("run")]
    assert turns == ["quire", "slow", "slow", "quire", "quire", "slow"]
    # Nobody runs while another one does: each is held from its start on, and let go for its turn only.
    assert log[:4] == ["quire start", "quire hold", "slow start", "slow hold"]
    assert log[4:10] == ["quire release", "quire run", "quire hold", "slow release", "slow run", "slow hold"]
    assert log[-2:] == ["quire stop", "slow stop"]
    assert measure.figures(records["quire"]) == {"output tokens/s": {"median": 20.0, "min": 10.0, "max": 40.0}}
    assert records["slow"].agreement == {"requests": 2, "same": 0, "first": 0, "prefix": 0.0}
    made = report.result(records, {"vllm": "not here"}, about())
    table = report.markdown(made)
    assert "| **quire** | 20.0 | 10.0 | 40.0 |  |" in table
    assert "| slow | 10.0 | 5.0 | 10.0 | 2.00 × |" in table
    assert "`slow --fast`" in table
    assert "- **vllm**: not here" in table


def about() -> dict[str, Any]:
    return {"kind": "throughput", "model": "m", "what": "w", "date": "d", "rounds": 3, "machine": {"cpu": "c", "threads": 2}}


def test_an_engine_that_breaks_is_left_out_and_the_others_go_on() -> None:
    log: list[str] = []
    engines = [MadeUp("quire", [1, 1], log), MadeUp("broken", [1, -1], log)]
    records = measure.measure(engines, measure.Throughput([(5, 10)]), 2, 100)
    made = report.result(records, {}, about())
    assert list(made["engines"]) == ["quire"]
    assert len(made["engines"]["quire"]["runs"]) == 2
    assert made["not_measured"] == {"broken": "broken broke"}
    assert "broken stop" in log


def test_restarted_engines_are_never_there_together() -> None:
    log: list[str] = []
    measure.measure(
        [MadeUp("a", [1, 1], log), MadeUp("b", [1, 1], log)], measure.Throughput([(5, 10)]), 2, 100, restart=True
    )  # fmt: skip
    starts = [line for line in log[:-2] if line.endswith(("start", "stop"))]
    assert starts == ["a start", "a stop", "b start", "b stop", "b start", "b stop", "a start", "a stop"]


def test_decode_subtracts_the_prompt_and_prefill_takes_the_median() -> None:
    records = measure.measure([MadeUp("a", [1.0, 11.0, 3.0], [])], measure.Decode(128, 91), 1, 100)
    assert records["a"].runs[0]["figures"] == {"decode tokens/s": 10.0}
    records = measure.measure([MadeUp("a", [1.0, 4.0, 2.0, 8.0, 8.0, 9.0], [])], measure.Prefill((512, 2048)), 1, 100)
    assert records["a"].runs[0]["figures"] == {"prefill of 512, tokens/s": 256.0, "prefill of 2,048, tokens/s": 256.0}


def test_rounds_have_the_same_lengths_and_other_tokens() -> None:
    seen: list[list[tuple[list[int], int]]] = []

    class Watched(MadeUp):
        def run(self, requests: list[tuple[list[int], int]]) -> Answer:
            if len(requests) != len(measure.WARM_UP):
                seen.append(requests)
            return super().run(requests)

    measure.measure([Watched("a", [1, 1], []), Watched("b", [1, 1], [])], measure.Throughput([(5, 3), (9, 2)]), 2, 50)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert [(len(p), n) for p, n in seen[0]] == [(len(p), n) for p, n in seen[2]] == [(5, 3), (9, 2)]
    assert seen[0] != seen[2]


SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)
    def do_GET(self): self.reply({})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        length = min(asked["max_tokens"], 7)
        self.reply({"choices": [{"token_ids": [1] * length}], "usage": {"completion_tokens": length}})
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(tmp_path: Path, code: str) -> served.Served:
    return served.Served(
        "other", [sys.executable, "-c", code, "PORT"], {}, tmp_path, path="/v1/completions", body=served.completion_body,
        read=served.read_completion, settings={},
    )  # fmt: skip


def test_answers_of_another_length_do_not_count(tmp_path: Path) -> None:
    other = server(tmp_path, SERVER)
    other.start()
    try:
        assert other.run([([1, 2], 7), ([3], 2)]).outputs == [[1] * 7, [1] * 2]
        with pytest.raises(PeerFailed, match="7 tokens, and 7 in its usage, where 9 were asked for"):
            other.run([([1, 2], 9)])
    finally:
        other.stop()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"other ended with code 3 before it was ready(.|\n)*no such model"):
        server(tmp_path, "import sys; print('no such model'); sys.exit(3)").start()


def family(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def test_a_held_child_stands_still_and_a_stopped_one_is_gone(tmp_path: Path) -> None:
    # The child has one of its own: holding and stopping are for the whole family.
    code = "import os, sys, time; os.fork(); [print(i, flush=True) or time.sleep(0.01) for i in range(6000)]"
    child = Child([sys.executable, "-c", code], {}, tmp_path / "log")
    log = tmp_path / "log"

    def size() -> int:
        return log.stat().st_size

    def wait_for_more() -> None:
        before = size()
        wait_until(lambda: size() > before, "it writes")

    wait_for_more()
    child.signal(signal.SIGSTOP)
    wait_until(lambda: [state_of(pid) for pid in family(child.process.pid)] == ["T", "T"], "both stand still")
    stopped = size()
    time.sleep(0.3)
    assert size() == stopped
    child.signal(signal.SIGCONT)
    wait_for_more()
    members = family(child.process.pid)
    child.stop()
    wait_until(lambda: all(map(is_gone, members)), "both are gone")


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """Values, tensors (shape as numpy has it, type, offset) and where the data starts: read by the format's description."""
    data, at = file.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return text() if kind == 8 else take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    assert (take("4s"), take("I")) == (b"GGUF", 3)
    tensors, values = take("Q"), take("Q")
    read = {text(): value(take("I")) for _ in range(values)}
    infos = {}
    for _ in range(tensors):
        name = text()
        shape = tuple(reversed([take("Q") for _ in range(take("I"))]))
        infos[name] = (shape, take("I"), take("Q"))
    return read, infos, at + -at % 32


def write_vocabulary(folder: Path) -> None:
    """Of 64 tokens."""
    vocabulary = {chr(0x100 + i): i for i in range(64)}
    tokenizer = {"added_tokens": [{"id": 2, "content": "<end>"}], "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_gguf_has_the_same_weights(tmp_path: Path) -> None:
    config = {**LLAMA, "vocab_size": 64}
    weights = checkpoint(config)
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_vocabulary(tmp_path)
    gguf.write_gguf(tmp_path, tmp_path / "out.gguf", "f32")
    values, infos, start = read_gguf(tmp_path / "out.gguf")
    assert (values["llama.block_count"], values["llama.attention.head_count_kv"], values["llama.rope.freq_base"]) == (4, 2, 500000.0)
    assert values["tokenizer.ggml.tokens"][1:3] == ["ā", "<end>"]
    assert values["tokenizer.ggml.token_type"][1:3] == [1, 3]
    data = (tmp_path / "out.gguf").read_bytes()

    def tensor(name: str) -> Any:
        shape, kind, offset = infos[name]
        assert (kind, offset % 32) == (0, 0)
        return np.frombuffer(data, np.float32, int(np.prod(shape)), start + offset).reshape(shape)

    assert len(infos) == len(weights)
    assert np.array_equal(tensor("output.weight"), weights["lm_head.weight"])
    assert np.array_equal(tensor("blk.3.ffn_down.weight"), weights["model.layers.3.mlp.down_proj.weight"])
    # Heads of 16: rows 0 and 8 of a head are rotated together; llama.cpp rotates rows 0 and 1.
    q, written = weights["model.layers.1.self_attn.q_proj.weight"], tensor("blk.1.attn_q.weight")
    assert np.array_equal(written[16 * 5 : 16 * 5 + 4], q[[80, 88, 81, 89]])


def test_gguf_of_experts_in_mxfp4(tmp_path: Path) -> None:
    """Stay what they are; all that config.json says is in the file's fields."""
    config = {**GPT_OSS, "vocab_size": 64}
    folder = packed_folder(write_model(tmp_path / "floats", config), tmp_path / "packed", "mxfp4")
    write_vocabulary(folder)
    gguf.write_gguf(folder, tmp_path / "out.gguf", "bf16")
    made, model = load_model(tmp_path / "out.gguf"), load_model(folder)
    assert made.spec == replace(model.spec, dtype=made.spec.dtype, bos_token_id=made.spec.bos_token_id)
    for name, wanted in model.tensors.items():
        assert np.array_equal(np.asarray(made.tensors[name], np.float32), np.asarray(wanted, np.float32)), name


@pytest.mark.parametrize(("width", "size", "error"), [("q8", 34, 1 / 127), ("q4", 18, 1 / 8)])
def test_quantized_groups(width: str, size: int, error: float) -> None:
    values = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    values[2, :32] = 0
    stored = gguf.encode(values, width)
    assert (stored.shape, stored.dtype) == ((10, size), np.uint8)
    scale = stored[:, :2].copy().view(np.float16).astype(np.float32)
    if width == "q8":
        back = stored[:, 2:].view(np.int8) * scale
    else:
        back = (np.concatenate([stored[:, 2:] & 15, stored[:, 2:] >> 4], axis=1).astype(np.float32) - 8) * scale
    groups = values.reshape(10, 32)
    assert np.all(np.abs(back - groups) <= np.abs(groups).max(1, keepdims=True) * error * 1.01)
    assert np.array_equal(back[4], np.zeros(32))  # the group of zeros


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run on the embedded model: the folder, and what it printed."""
    out = tmp_path_factory.mktemp("peers")
    command = [sys.executable, "-P", str(BENCHMARKS / "peers.py"), "embedded", "--out", str(out), "--requests", "5", "--prompt-mean", "12",
               "--output-mean", "6", "--rounds", "2", "--engines", "quire,vllm,llama-q8,hf-one,small", "--define",
               "small=quire --max-num-seqs 2", *NOWHERE]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


def test_quire_runs_behind_http_and_its_outputs_agree(measured: tuple[Path, str, str]) -> None:
    out, printed, _ = measured
    made = json.loads((out / "throughput.json").read_text())
    assert list(made["engines"]) == ["quire", "small"]
    tokens = sum(length for _, length in made["lengths"])
    for engine in made["engines"].values():
        assert [run["output_tokens"] for run in engine["runs"]] == [tokens, tokens]
        rates = [tokens / run["seconds"] for run in engine["runs"]]
        assert engine["figures"]["output tokens/s"] == pytest.approx({"median": sum(rates) / 2, "min": min(rates), "max": max(rates)})
        assert engine["agreement"] == {"requests": 5, "same": 5, "first": 5, "prefix": 1.0}  # the same bytes, whatever the batch
    assert "--max-num-seqs 2" in made["engines"]["small"]["settings"]["command"]
    assert (out / "throughput.md").read_text() in printed
    assert (out / "throughput.svg").stat().st_size > 1000


def test_what_is_not_installed_is_named_with_the_remedy(measured: tuple[Path, str, str]) -> None:
    out, _, said = measured
    missing = json.loads((out / "throughput.json").read_text())["not_measured"]
    assert list(missing) == ["vllm", "llama-q8", "hf-one"]
    assert re.search("/nowhere/python does not run.*--vllm-python", missing["vllm"])
    assert re.search("/nowhere/llama-server is not on the PATH.*--llama-server", missing["llama-q8"])
    assert re.search("torch==2.13.0.*--transformers-python", missing["hf-one"])
    assert all(f"without {name}: {why}" in said for name, why in missing.items())


def test_a_signal_leaves_no_engine_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(BENCHMARKS / "peers.py"), "embedded", "--out", str(tmp_path), "--engines", "quire,second",
               "--define", "second=quire", "--requests", "64", "--output-mean", "512", "--rounds", "50"]  # fmt: skip
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    while "second is ready" not in (line := run.stderr.readline()):
        assert line, "ended before it was ready"
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert len(children) == 2
    run.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    run.send_signal(signal.SIGTERM)  # as timeout does, which signals the process and then its group
    assert run.wait(60) == 128 + signal.SIGTERM
    run.stderr.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main([str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert peers.main(["embedded", "--out", str(tmp_path), "--prompt-mean", "600"]) == 2
    assert "mean length must be from 1 to the longest length 512, got 600" in capsys.readouterr().err
    assert peers.main(["embedded", "--out", str(tmp_path), "--engines", "nobody"]) == 1
    assert "without nobody: no engine has this name; there are: quire, " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--define 'x' must be NAME=ENGINE"):
        peers.main(["embedded", "--out", str(tmp_path), "--define", "x"])
