"""Perplexity on held-out text, for every width of weights and of the KV cache that is asked for.

    python benchmarks/perplexity.py [MODEL] [--weights float32 int8 int4 ...] [--kv float32 int8 ...]

The text: the files of the installed Python's standard library that the embedded model was not trained on (see
docs/embedded-model.md; chosen by name, so any Python has nearly the same ones). Each file begins with the model's
beginning-of-text token and is cut into windows, that are computed as a server would: in chunks, over a paged KV cache, by
the engine's own decoder. Every position but the first of a window is predicted.

A width of weights is float32, bfloat16, float16, or int8 or int4 with perhaps a group size (int8:64). The first combination
is the reference: the others' differences are given in percent, with the standard error of the paired difference.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from quire.backends.cpu.decoder import Decoder
from quire.backends.cpu.packer import Packer
from quire.backends.rows import Rows
from quire.config import EngineConfig
from quire.core.plan import RowStart, RowWork
from quire.models.quantization import Quantization
from quire.models.spec import TransformerSpec
from quire.models.weights import Model, load_model, resolve_model
from quire.sampling_params import SamplingParams
from quire.text.tokenizer import Tokenizer

BLOCK_SIZE = 16
TESTS = {"test", "tests", "idle_test"}
OTHERS = {"site-packages", "__pycache__", "data", "lib-dynload", "pydoc_data"}
NEAR_COPIES = {"lib2to3/pgen2/tokenize.py"}
"""Would be held out by their names, but equal files that the model was trained on."""


def held_out() -> list[tuple[str, str]]:
    """(name, text) of the standard library's files that tools/train_embedded.py keeps from training, by the same rule."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        bucket = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 1000
        if bucket >= 40 or name.as_posix() in NEAR_COPIES or name.name.startswith(("test_", "_sysconfigdata")):
            continue
        if (TESTS | OTHERS) & set(name.parts) or name.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_bytes().decode()
            statements = sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(text)))
        except (ValueError, SyntaxError):
            continue
        if len(text) >= 2048 and (len(text) <= 4096 or statements * 400 >= len(text)):  # tables are no text
            found.append((name.as_posix(), text))
    return found


def windows(folder: Path, spec: TransformerSpec, length: int, limit: int | None) -> list[list[int]]:
    """Token windows of at most ``length`` tokens; in all at most ``limit``, taken evenly from the whole text."""
    tokenizer = Tokenizer.load(folder)
    start = [spec.bos_token_id] if spec.bos_token_id is not None else []
    cut = []
    for _, text in held_out():
        tokens = tokenizer.encode(text)
        if tokens[:1] != start:
            tokens = start + tokens
        cut += [tokens[i : i + length] for i in range(0, len(tokens), length)]
    cut = [window for window in cut if len(window) > 1]
    total = sum(map(len, cut))
    return cut if limit is None or limit >= total else cut[:: -(-total // limit)]


def log_likelihoods(decoder: Decoder, tokens: list[int], chunk: int) -> np.ndarray:
    """[len(tokens) - 1] natural log-probability of each token but the first, under those before it."""
    count = len(tokens)
    rows = Rows(1, count, BLOCK_SIZE)
    rows.begin(RowStart(0, tokens, count, SamplingParams(), 0, ()))
    out = np.empty(count - 1)
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        first = -(-start // BLOCK_SIZE)
        blocks = list(range(first, -(-(start + size) // BLOCK_SIZE)))
        batch = rows.batch([RowWork(0, start, size, blocks, True, first)])
        batch.asked = None  # logits of all positions, not of the last one only
        logits = decoder.forward(batch)
        following = np.array(tokens[start + 1 : start + size + 1])
        logits = logits[: len(following)]
        top = logits.max(axis=1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
        out[start : start + len(following)] = logits[np.arange(len(following)), following] - total
    return out


@dataclass(slots=True, frozen=True)
class Variant:
    weights: str
    """float32, bfloat16, float16, int8, int4, int8:64, ... or stored"""
    kv: str

    def decoder(self, model: Model, window: int, chunk: int) -> Decoder:
        kind, _, group = self.weights.partition(":")
        floats = kind in ("float32", "bfloat16", "float16")
        config = EngineConfig(quantize="none" if floats else kind, group_size=int(group) if group else None).as_stored(model.spec.quantized)
        quantization = Quantization.of(config, model.spec)
        if quantization is not None:
            quantization.check(model.spec)
        return Decoder(
            model.spec,
            model.tensors,
            num_blocks=-(-window // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            kv_dtype=self.kv,
            max_tokens=chunk,
            max_rows=chunk,
            max_model_len=window,
            packer=Packer(kind if floats else None, quantization, blocks=model.blocks),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded", help="folder in Hugging Face format (default: the embedded model)")
    parser.add_argument("--weights", nargs="+", default=["float32"], metavar="WIDTH")
    parser.add_argument("--kv", nargs="+", default=["float32"], metavar="WIDTH")
    parser.add_argument("--window", type=int, default=1024, metavar="TOKENS", help="longest context (default: 1024)")
    parser.add_argument("--chunk", type=int, default=512, metavar="TOKENS", help="positions in a step (default: 512)")
    parser.add_argument("--tokens", type=int, metavar="N", help="about this many tokens, evenly taken (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    model = load_model(resolve_model(args.model))
    cut = windows(model.folder, model.spec, args.window, args.tokens)
    print(
        f"{model.folder.name}: {sum(map(len, cut)):,} tokens of {len(held_out())} files, in {len(cut)} windows of at most {args.window:,}"
    )
    reference, rows = None, []
    for variant in (Variant(weights, kv) for kv in args.kv for weights in args.weights):
        started = perf_counter()
        decoder = variant.decoder(model, args.window, args.chunk)
        lengths = np.array([len(tokens) - 1 for tokens in cut])
        scores = np.array([log_likelihoods(decoder, tokens, args.chunk).sum() for tokens in cut])
        reference = scores if reference is None else reference
        per_token = -scores.sum() / lengths.sum()
        # Windows are the sample: tokens within one are not independent.
        gap = (reference - scores) - lengths * (reference - scores).sum() / lengths.sum()
        error = np.sqrt((gap**2).sum() * len(cut) / max(1, len(cut) - 1)) / lengths.sum()
        change = 100 * np.expm1((reference - scores).sum() / lengths.sum())
        row: dict[str, Any] = {
            "weights": variant.weights, "kv": variant.kv, "perplexity": float(np.exp(per_token)), "percent": float(change),
            "error": float(100 * error), "weight_bytes": decoder.weight_bytes(),
        }  # fmt: skip
        rows.append(row)
        print(
            f"weights {variant.weights:<9} KV {variant.kv:<9} {row['weight_bytes'] / 1e6:9.2f} MB  perplexity {row['perplexity']:9.5f}  "
            f"{change:+7.3f} % ± {row['error']:.3f}   ({perf_counter() - started:.1f} s)",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
