"""Loading: weights go to the device tensor by tensor, and host memory holds no second copy of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from sample_models import LLAMA, checkpoint, write_model

# What is resident is looked at after each tensor was copied, before its file's pages are given back: there it is greatest. The device's
# memory is the host's here, and counts once.
SCRIPT = """
import json, sys
from quire.config import EngineConfig
from quire.models.weights.checkpoint import Model


def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) << 10


seen, give_back = [], Model.release


def release(self):
    seen.append(resident())
    give_back(self)


def report(phase, seconds):
    if phase == "open the device":
        seen.append(resident())
    if phase == "load the weights":
        print(json.dumps(seen))
        sys.exit()


from quire.backends.cuda.opening import open_rank

Model.release = release
open_rank(EngineConfig(model=sys.argv[1], device="torch-cpu"), report=report)
"""


def test_host_memory_holds_no_second_copy(tmp_path: Path) -> None:
    config = LLAMA | {
        "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    tensors = checkpoint(config, np.float32)
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    total, largest = sum(tensor.nbytes for tensor in tensors.values()), max(tensor.nbytes for tensor in tensors.values())
    assert largest < total / 7
    command = [sys.executable, "-c", SCRIPT, str(write_model(tmp_path / "model", config, tensors))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
    before, *during = json.loads(found.stdout)
    assert len(during) >= len(tensors) - 1
    # Besides what is loaded only the linear that is on its way, with its parts.
    assert max(during) - before < total + 4 * largest < 1.5 * total
