"""Steps of a model with parts of them left out, or done otherwise: what each costs where kernels overlap, which no profile shows.

    python benchmarks/cuda_variants.py [MODEL ...] [--rows 1 8 32 64 128 256] [--context 1024] [--only whole,...] [--device cuda|torch-cpu]

Models: as in cuda_models.py (Qwen3-0.6B, Llama-3.1-8B). Milliseconds of a decode step, the better of two times 30, for each number of rows:
captured in a graph, launched ahead, as an engine runs them. What comes out of a step without its norms is nonsense, and takes as long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402

from cuda_models import make_backend, make_decoder  # noqa: E402
from cuda_steps import free, step_seconds  # noqa: E402
from quire.backends.cuda import backend as backends  # noqa: E402
from quire.backends.cuda.decoder import Decoder  # noqa: E402
from quire.backends.cuda.device import open_device, operations  # noqa: E402
from quire.backends.cuda.weights import Experts  # noqa: E402

COUNT = 30


def changes(ops: ModuleType, decoder: Decoder, on_gpu: bool) -> dict[str, list[Any]]:
    """Variant → what is patched for it."""
    found: dict[str, list[Any]] = {
        "whole": [],
        "no norms": [patch.object(ops, "rms_norm", lambda x, *rest: x)],
        "no KV writes": [patch.object(ops, "write_kv", lambda *rest: None)],
        "no attention": [patch.object(ops, "decode", lambda *rest: None)],
        "no logits, no draws": [patch.object(backends.CudaBackend, "_decode", _without_draws)],
    }
    if on_gpu:
        from quire.backends.cuda.kernels import attention, kv_write, layers, linear

        found["no early starts"] = [patch.object(module, "programmatic", lambda: False) for module in (attention, kv_write, layers, linear)]
        found["products of the library"] = [patch.object(linear, "FEW", 0)]
    linears = [each for layer in decoder.layers for each in (layer.qkv, layer.o)]
    for mlp in (layer.mlp for layer in decoder.layers):
        plain = mlp.shared if isinstance(mlp, Experts) else mlp
        linears += [mlp.router] if isinstance(mlp, Experts) else []
        linears += [plain.up, plain.down] if plain is not None else []
    found["--deterministic"] = [patch.object(each, "same", True) for each in [*linears, decoder.lm_head]]
    return found


def _without_draws(self: Any, step: Any, samples: Any, truncates: bool) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = self.decoder.hidden(step)
    return self._logits[: step.num_decoding], torch.zeros((2, step.num_decoding), dtype=torch.int32, device=hidden.device)


@contextmanager
def captured(rows: list[int]) -> Iterator[None]:
    """Steps of these numbers of rows alone: each variant captures its own."""
    sizes: Callable[[int], list[int]] = lambda most: rows  # noqa: E731
    with patch.object(backends, "sizes", sizes):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["Qwen3-0.6B", "Llama-3.1-8B"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--only", default="", help="variants, with commas between them")
    parser.add_argument("--device", default="cuda", choices=("cuda", "torch-cpu"))
    args = parser.parse_args()
    device = open_device(args.device)
    ops = operations(device)
    rows = sorted(args.rows)
    for model in args.models:
        decoder = make_decoder(model, device, ops)
        blocks = rows[-1] * (-(-(args.context + 256) // 16) if device.type == "cpu" else -(-(args.context + 256) // 64)) + 1
        print(f"{model}, ms a step, context {args.context:,}; rows: {'  '.join(f'{n:6}' for n in rows)}")
        for name, patches in changes(ops, decoder, device.type == "cuda").items():
            if args.only and name not in args.only.split(","):
                continue
            with ExitStack() as stack, captured(rows):
                for each in patches:
                    stack.enter_context(each)
                backend = make_backend(decoder, device, ops, most_blocks=blocks, max_num_seqs=rows[-1], max_num_batched_tokens=2048)
                times = [min(step_seconds(backend, n, args.context, True, COUNT) for _ in range(2)) * 1e3 for n in rows]
            print(f"  {name:26} {'  '.join(f'{each:6.3f}' for each in times)}", flush=True)
            del backend
            decoder.forget_pool()
            free()
        del decoder
        free()


if __name__ == "__main__":
    main()
