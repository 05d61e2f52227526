"""Tensor parallelism on gloo processes: the tokens of one device; a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.backends.base import open_backend
from quire.backends.cuda.parallel import shard
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.models.families import spec_from_config
from quire.models.parallel import check
from quire.models.weights import load_model
from sample_models import ERNIE_MOE, GLM4_MOE, GPT_OSS_SHORT, LLAMA, OLMO2, write_model

FIXTURES = Path(__file__).parents[2] / "fixtures" / "golden"
DEADLINE_S = 120
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}

RUN = """
import sys
import numpy as np
import torch
import running
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams

torch.set_num_threads(1)
folder, size, speculation = sys.argv[1], int(sys.argv[2]), sys.argv[3]
prompt = list(range(20, 61))
if folder != "embedded":
    with np.load(folder + "/golden.npz") as arrays:
        prompt = arrays["prompt"].tolist()
engine = running.open_engine(folder, device="torch-cpu", dtype="float32", kv_dtype="float32", block_size=8, tensor_parallel=size, threads=1,
                             max_num_batched_tokens=16, speculation=speculation)
greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
other = SamplingParams(temperature=0.0, max_tokens=20, n=1, ignore_eos=True, frequency_penalty=0.5, logprobs=1, prompt_logprobs=1)
least = SamplingParams(temperature=0.0, max_tokens=24, min_tokens=20)
search = SamplingParams(temperature=0.0, use_beam_search=True, n=2, max_tokens=6)
requests = [Request(f"{i}", prompt[i:], params, 0, ()) for i, params in enumerate((greedy, other, least, search))]
found = running.run(engine, requests, preempt_every=9).outputs
print([output.token_ids for _, output in sorted(found.items())])
"""

SERVE = """
import os, sys, threading, time
from quire.llm import LLM
from quire.sampling_params import SamplingParams

llm = LLM("embedded", device="torch-cpu", tensor_parallel=2, threads=1, kv_memory="64MiB")
print([p.pid for p in llm.backend._ranks._processes][0], flush=True)
while True:
    llm.generate(["import os"] * 4, SamplingParams(max_tokens=50), use_tqdm=False)
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("name", "sizes"), [("embedded", (1, 2, 4)), ("opt", (1, 2)), ("gpt2", (1, 3)), ("glm4", (1, 2))])
def test_the_tokens_of_one_device(name: str, sizes: tuple[int, ...]) -> None:
    compare(name if name == "embedded" else str(FIXTURES / name), sizes)


@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS_SHORT, GLM4_MOE, ERNIE_MOE, OLMO2], ids=lambda config: config["model_type"])
def test_the_tokens_of_one_device_of_a_random_model(config: dict[str, Any], tmp_path: Path) -> None:
    """Experts; norms of heads that several devices have. No fixture that has any can be divided."""
    folder = write_model(tmp_path / "model", config)
    np.savez(folder / "golden.npz", prompt=np.arange(40) * 17 % config["vocab_size"])
    compare(str(folder), (1, 2))


def compare(folder: str, sizes: tuple[int, ...]) -> None:
    processes = [run(RUN, folder, str(size), "prompt-lookup" if size == 2 else "off") for size in sizes]
    found = [process.communicate(timeout=DEADLINE_S) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), found
    assert len({out for out, _ in found}) == 1, found


def test_the_part_of_one_device_with_experts(tmp_path: Path) -> None:
    """Of every expert a part, and the whole router."""
    model = load_model(write_model(tmp_path / "model", MIXTRAL))
    spec, tensors = shard(model.spec, model.tensors, 1, 2)
    for name, shape in spec.tensor_shapes().items():
        if name != "lm_head.weight":
            assert tensors[name].shape == shape, name
    whole, at = model.tensors, "layers.3.experts.2"
    assert (tensors[f"{at}.gate.weight"] == whole[f"{at}.gate.weight"][100:]).all()
    assert (tensors[f"{at}.down.weight"] == whole[f"{at}.down.weight"][:, 100:]).all()
    assert (tensors["layers.3.router.weight"] == whole["layers.3.router.weight"]).all()


@pytest.mark.parametrize("config", [GLM4_MOE, ERNIE_MOE], ids=lambda config: config["model_type"])
def test_the_part_of_one_device_with_shared_experts(config: dict[str, Any], tmp_path: Path) -> None:
    """Of what all positions take, and of a layer without experts, a part; of what experts are chosen by all."""
    model = load_model(write_model(tmp_path / "model", config))
    whole, at = model.tensors, "layers.2"
    for rank in range(2):
        spec, tensors = shard(model.spec, model.tensors, rank, 2)
        for name, shape in spec.tensor_shapes().items():
            if name != "lm_head.weight":
                assert tensors[name].shape == shape, name
        shared, dense = spec.shared_size, spec.dense_sizes[0]
        assert (tensors[f"{at}.shared.up.weight"] == whole[f"{at}.shared.up.weight"][shared * rank :][:shared]).all()
        assert (tensors[f"{at}.shared.down.weight"] == whole[f"{at}.shared.down.weight"][:, shared * rank :][:, :shared]).all()
        assert (tensors["layers.0.gate.weight"] == whole["layers.0.gate.weight"][dense * rank :][:dense]).all()
        assert (tensors[f"{at}.correction.bias"] == whole[f"{at}.correction.bias"]).all()


def test_what_is_there_once_of_a_model_with_biases_and_sinks(tmp_path: Path) -> None:
    """Sinks are their heads', biases of gates those of the inner units; what is added to a sum is added by the first device."""
    model = load_model(write_model(tmp_path / "model", GPT_OSS_SHORT))
    whole, parts = model.tensors, [shard(model.spec, model.tensors, rank, 2) for rank in range(2)]
    at, once = "layers.1.experts.4", ("layers.1.o.bias", "layers.1.experts.4.down.bias")
    for rank, (spec, tensors) in enumerate(parts):
        lacking = spec.tensor_shapes().keys() - tensors.keys()
        assert lacking == {name for name in whole if name.endswith((".o.bias", ".down.bias")) and rank}
        assert (tensors["layers.1.sinks.weight"] == whole["layers.1.sinks.weight"][3 * rank :][:3]).all()
        assert (tensors[f"{at}.gate.bias"] == whole[f"{at}.gate.bias"][64 * rank :][:64]).all()
        assert (tensors[f"{at}.up.bias"] == whole[f"{at}.up.bias"][64 * rank :][:64]).all()
        assert (tensors["layers.1.router.bias"] == whole["layers.1.router.bias"]).all()
    assert all((parts[0][1][name] == whole[name]).all() for name in once)


def test_a_dead_rank_ends_the_engine_with_a_reason(tmp_path: Path) -> None:
    engine = run(SERVE, TMPDIR=str(tmp_path))
    assert engine.stdout is not None
    rank = int(engine.stdout.readline())
    time.sleep(0.2)
    os.kill(rank, signal.SIGKILL)
    _, err = engine.communicate(timeout=DEADLINE_S)
    assert engine.returncode == 70
    assert "rank 1 of 2, process" in err
    assert "was killed (SIGKILL)" in err
    assert not list(tmp_path.glob("quire-*")), "where the ranks have met"


def test_a_rank_ends_with_its_engine() -> None:
    engine = run(SERVE)
    assert engine.stdout is not None
    rank = int(engine.stdout.readline())
    engine.kill()
    engine.communicate(timeout=DEADLINE_S)
    end = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{rank}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_stream_goes_on_when_a_rank_dies() -> None:
    """The supervisor starts another engine, with all of its ranks, and the bytes are those of an undisturbed run."""
    harness = pytest.importorskip("server.harness", exc_type=ImportError)  # the server's libraries
    server = harness.Process("--device", "torch-cpu", "--tensor-parallel", "2", "--threads", "1", "--dtype", "float32")
    try:
        body = {"prompt": "import os", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        with harness.http.stream("POST", server.url + "/v1/completions", json=body | {"stream": True}) as answer:
            lines = answer.iter_lines()
            found = [next(lines) for _ in range(6)]
            os.kill(rank_of(server.engine_pid), signal.SIGKILL)
            found += lines
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in found if line.startswith("data: {"))
        calm = harness.http.post(server.url + "/v1/completions", json=body).json()["choices"][0]["text"]
        assert text == calm
        assert harness.http.get(server.url + "/health").json()["engine_restarts"] == 1
    finally:
        server.kill()


def rank_of(engine: int) -> int:
    """The process of the other rank."""
    (child,) = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
    return int(child)


def test_what_can_not_be_divided() -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel 5 does not divide the model's 4 attention heads: choose 2"):
        open_backend(EngineConfig(model=str(FIXTURES / "qwen3-tied"), device="torch-cpu", tensor_parallel=5))
    spec = spec_from_config({**GLM4_MOE, "intermediate_size": 201})
    with pytest.raises(
        ConfigError, match="--tensor-parallel 2 does not divide the model's 201 inner units of a feed-forward: leave it out"
    ):
        check(spec, 2)
    with pytest.raises(ConfigError, match="is for GPUs"):
        EngineConfig(tensor_parallel=2)
