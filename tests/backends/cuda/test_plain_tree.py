"""The offline engine from a plain source tree, on a machine that has PyTorch, numpy, tokenizers, safetensors and jinja2, and nothing else
that Quire could use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import quire

ABSENT = (
    "msgspec", "zmq", "starlette", "fastapi", "pydantic", "uvicorn", "httptools", "llguidance", "ml_dtypes", "prometheus_client",
    "multipart", "python_multipart", "httpx", "openai", "anthropic", "matplotlib", "opentelemetry", "quire.backends.cpu._native",
)  # fmt: skip
SCRIPT = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
from quire.llm import LLM
from quire.sampling_params import SamplingParams

llm = LLM(device="torch-cpu", kv_memory="16MiB", max_num_seqs=4)
for params in SamplingParams(temperature=0.0, max_tokens=8), SamplingParams(n=2, seed=1, top_p=0.9, max_tokens=8):
    print([choice.text for output in llm.generate(["import os\\n", "def f("], params) for choice in output.outputs])
assert not set(sys.argv[1:]) & set(sys.modules)
"""


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(Path(quire.__file__).parent, tmp_path / "quire", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *ABSENT]
    found = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "import sys" in found.stdout
