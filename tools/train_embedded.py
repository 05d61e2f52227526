"""Train Quire's embedded model: a small Llama on the Python standard library.

Everything comes from the Python that runs this script: the data is the source text
of its standard library (`sysconfig.get_path("stdlib")`), so no download is needed.

    python tools/train_embedded.py --minutes 80 --out OUT      train, then export to OUT/model
    torchrun --nproc-per-node 2 tools/train_embedded.py --threads 1 ...   the same in two processes
    python tools/train_embedded.py --out OUT --resume          go on from OUT/checkpoint.pt
    python tools/train_embedded.py --out OUT --export DIR      write a checkpoint as a model folder
    python tools/train_embedded.py --out OUT --report          losses, baselines, samples

OUT receives `tokenizer.json`, `data.json` (what was read), `log.jsonl` (one line per
evaluation), `checkpoint.pt` and, with --report, `report.json`.

Needs torch >= 2.9 (for `torch.optim.Muon`), numpy, tokenizers and safetensors.
The choices made here are explained in docs/embedded-model.md.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import re
import statistics
import sysconfig
import textwrap
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

EOS, EOS_TEXT = 0, "<|endoftext|>"
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4096, 256, 704, 6, 8, 4, 32
CONTEXT, ROPE_THETA, NORM_EPS = 2048, 10000.0, 1e-5
# Line breaks with the indentation after them are one piece, an identifier (underscores
# included) takes at most one character before it, and at most three digits stay together.
SPLIT = (
    r"(?:\r?\n)+[ \t]*|[^\r\n\p{L}\p{N}_]?[\p{L}_]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}_]+|[^\S\r\n]+(?!\S)|\s+"
)
SKIP_FOLDERS = {"site-packages", "__pycache__", "data", "lib-dynload", "pydoc_data"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
# Plain text, as the model continues code and knows no roles.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
)
PROMPTS = [
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):",
    "import os\n\ndef ",
    "for i in range(",
    "def read_lines(path):\n    with open(",
    "try:\n    import ",
    "    def __repr__(self):\n        return",
    'if __name__ == "__main__":\n    ',
]


# ---------------------------------------------------------------- data


def is_literal_heavy(text: str, tree: ast.Module) -> bool:
    """True for tables: over 4 KB with fewer than one statement per 400 characters."""
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    return len(text) > 4096 and statements * 400 < len(text)


def read_stdlib() -> tuple[dict[str, list[tuple[str, str]]], dict[str, Any]]:
    """Read the library: {"train", "tests", "valid"} -> (path, text) pairs, and a summary."""
    root = Path(sysconfig.get_path("stdlib"))
    groups: dict[str, list[tuple[str, str]]] = {"train": [], "tests": [], "valid": []}
    dropped = {"unreadable": 0, "table": 0, "duplicate": 0, "test_of_valid": 0, "valid_near_copy": 0}
    tables: list[str] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        rel = path.relative_to(root)
        if SKIP_FOLDERS & set(rel.parts) or rel.name.startswith("_sysconfigdata") or rel.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            dropped["unreadable"] += 1
            continue
        if is_literal_heavy(text, tree):
            dropped["table"] += 1
            tables.append(rel.as_posix())
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text.strip() or digest in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(digest)
        name = rel.as_posix()
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000
        if TEST_FOLDERS & set(rel.parts) or rel.name.startswith("test_"):
            groups["tests"].append((name, text))
        elif bucket < 40 and len(text) >= 2048:
            groups["valid"].append((name, text))
        else:
            groups["train"].append((name, text))
    lines = {name: {x for x in map(str.strip, text.splitlines()) if len(x) >= 20} for name, text in groups["train"] + groups["valid"]}
    for pair in list(groups["valid"]):  # near-copies of a training file are no validation
        own = lines[pair[0]]
        if any(len(own & lines[other]) * 4 > len(own) for other, _ in groups["train"]):
            groups["valid"].remove(pair)
            groups["train"].append(pair)
            dropped["valid_near_copy"] += 1
    held_out = {"test_" + Path(name).stem.strip("_") for name, _ in groups["valid"]}
    kept = [(n, t) for n, t in groups["tests"] if not held_out & set(Path(n).with_suffix("").parts)]
    dropped["test_of_valid"] = len(groups["tests"]) - len(kept)
    groups["tests"] = kept
    whole = hashlib.sha256()
    for group in ("train", "tests", "valid"):
        for name, text in groups[group]:
            whole.update(f"{group} {name} {hashlib.sha256(text.encode()).hexdigest()}\n".encode())
    info = {
        "python": platform.python_version(),
        "sha256": whole.hexdigest(),
        "dropped": dropped,
        "tables": tables,
        "valid_files": [name for name, _ in groups["valid"]],
        "files": {g: len(docs) for g, docs in groups.items()},
        "bytes": {g: sum(len(t.encode()) for _, t in docs) for g, docs in groups.items()},
    }
    return groups, info


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; the alphabet is all 256 bytes, so any text round-trips."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    # A prompt begins a document, as in training; without this the model takes it for the middle of a file.
    tok.post_processor = processors.TemplateProcessing(
        single=f"{EOS_TEXT} $A", pair=f"{EOS_TEXT} $A {EOS_TEXT} $B", special_tokens=[(EOS_TEXT, EOS)]
    )
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[EOS_TEXT], show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
        ),
    )
    return tok


def encode(tok: Tokenizer, docs: list[tuple[str, str]]) -> list[np.ndarray]:
    """Each document as EOS followed by its tokens."""
    out = tok.encode_batch([text for _, text in docs], add_special_tokens=False)
    return [np.array([EOS, *e.ids], dtype=np.int64) for e in out]


def load_data(out: Path) -> tuple[Tokenizer, dict[str, list[np.ndarray]], dict[str, Any]]:
    """Read and encode the library; the tokenizer is made once and kept in `out`."""
    groups, info = read_stdlib()
    path = out / "tokenizer.json"
    if not path.exists():
        train_tokenizer([text for _, text in groups["train"]]).save(str(path))
    tok = Tokenizer.from_file(str(path))
    data = {group: encode(tok, docs) for group, docs in groups.items()}
    info["tokens"] = {g: int(sum(map(len, docs))) for g, docs in data.items()}
    (out / "data.json").write_text(json.dumps(info, indent=1))
    return tok, data, info


class Stream:
    """Windows of `length + 1` tokens: each pass cuts the shuffled documents afresh."""

    def __init__(self, docs: list[np.ndarray], rng: np.random.Generator) -> None:
        self.docs, self.rng, self.length = docs, rng, 0
        self.queue: list[np.ndarray] = []

    def next(self, length: int) -> np.ndarray:
        if length != self.length or not self.queue:
            self.length = length
            order = self.rng.permutation(len(self.docs))
            joined = np.concatenate([self.docs[i] for i in order])[self.rng.integers(length) :]
            count = (len(joined) - 1) // length
            self.queue = [joined[i * length : (i + 1) * length + 1] for i in self.rng.permutation(count)]
        return self.queue.pop()


class IndentSplitter:
    """Now and then replaces a "newline + indentation" token by its two halves, so that
    the model also knows how to go on from a prompt that ends in a bare newline."""

    def __init__(self, tok: Tokenizer, rng: np.random.Generator, rate: float = 0.05) -> None:
        self.rng, self.rate = rng, rate
        self.parts: dict[int, list[int]] = {}
        for token in range(1, VOCAB):
            if match := re.fullmatch(r"([\r\n]+)([ \t]+)", tok.decode([token])):
                self.parts[token] = [i for half in match.groups() for i in tok.encode(half, add_special_tokens=False).ids]
        self.splittable = np.zeros(VOCAB, dtype=bool)
        self.splittable[list(self.parts)] = True

    def __call__(self, window: np.ndarray) -> np.ndarray:
        hit = np.flatnonzero(self.splittable[window] & (self.rng.random(len(window)) < self.rate))
        pieces: list[np.ndarray] = []
        start = 0
        for at in hit:
            pieces += [window[start:at], np.array(self.parts[int(window[at])])]
            start = at + 1
        return np.concatenate([*pieces, window[start:]])[: len(window)]


# ---------------------------------------------------------------- model


class Block(nn.Module):
    """One decoder layer; the parameter names are those of transformers' Llama."""

    def __init__(self) -> None:
        super().__init__()

        def linear(n: int, m: int) -> nn.Linear:
            return nn.Linear(n, m, bias=False)

        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(HIDDEN, HEADS * HEAD_DIM),
                "k_proj": linear(HIDDEN, KV_HEADS * HEAD_DIM),
                "v_proj": linear(HIDDEN, KV_HEADS * HEAD_DIM),
                "o_proj": linear(HEADS * HEAD_DIM, HIDDEN),
            }
        )
        self.mlp = nn.ModuleDict({"gate_proj": linear(HIDDEN, INNER), "up_proj": linear(HIDDEN, INNER), "down_proj": linear(INNER, HIDDEN)})
        self.input_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, dim=-1)
            return (t * cos + torch.cat((-b, a), dim=-1) * sin).to(t.dtype)

        a, h = self.self_attn, self.input_layernorm(x)
        q = rotate(a["q_proj"](h).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2))
        k = rotate(a["k_proj"](h).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2))
        v = a["v_proj"](h).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a["o_proj"](y.transpose(1, 2).reshape(batch, length, HIDDEN))
        m, h = self.mlp, self.post_attention_layernorm(x)
        return x + m["down_proj"](F.silu(m["gate_proj"](h)) * m["up_proj"](h))


class Llama(nn.Module):
    """The whole model: tied embeddings, rotary positions, grouped-query attention."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(VOCAB, HIDDEN),
                "layers": nn.ModuleList(Block() for _ in range(LAYERS)),
                "norm": nn.RMSNorm(HIDDEN, NORM_EPS),
            }
        )
        inv = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angle = torch.outer(torch.arange(CONTEXT).float(), torch.cat((inv, inv)))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, ids: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Logits, or with targets the cross-entropy in nats."""
        x = self.model["embed_tokens"](ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        logits = F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def losses(model: nn.Module, stream: np.ndarray, length: int, limit: int | None = None) -> np.ndarray:
    """Loss of every token of `stream` but the first, in windows of `length`, no overlap.

    With `limit`, only that many windows, spread evenly over the stream."""
    starts = list(range(0, len(stream) - 1, length))
    if limit is not None:
        starts = starts[:: max(1, len(starts) // limit)][:limit]
    ids, out = torch.from_numpy(stream), []
    for at in starts:
        window = ids[at : at + length + 1]
        out.append(model(window[None, :-1], window[None, 1:], reduction="none").numpy())
    return np.concatenate(out)


@torch.no_grad()
def complete(model: Llama, tok: Tokenizer, prompt: str, count: int = 96, temperature: float = 0.0, seed: int = 0) -> str:
    """The text that follows `prompt`: at most `count` tokens, up to end of document."""
    gen = torch.Generator().manual_seed(seed)
    ids = [EOS, *tok.encode(prompt, add_special_tokens=False).ids]
    start = len(ids)
    while len(ids) - start < count:
        logits = model(torch.tensor([ids[-CONTEXT:]]))[0, -1].float()
        probs = (logits / temperature).softmax(-1) if temperature > 0 else None
        token = int(logits.argmax() if probs is None else torch.multinomial(probs, 1, generator=gen))
        if token == EOS:
            break
        ids.append(token)
    return tok.decode(ids[start:], skip_special_tokens=False)


# ---------------------------------------------------------------- training


def shape(progress: float) -> float:
    """Learning-rate factor: warm up for 2 %, hold until 40 %, then linearly to zero."""
    return min(1.0, progress / 0.02 + 0.01, max(0.0, (1 - progress) / 0.6))


def average(model: nn.Module, seconds: float, ranks: int) -> float:
    """Average the gradients over the processes, and `seconds`, so that all keep one clock."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([seconds])])
    dist.all_reduce(flat)
    flat /= ranks
    for grad, piece in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
        grad.copy_(piece.view_as(grad))
    return float(flat[-1])


def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
        if rank > 0:
            dist.barrier()  # the first process makes the tokenizer
    tok, data, info = load_data(out)
    if ranks > 1 and rank == 0:
        dist.barrier()
    print(json.dumps({k: info[k] for k in ("python", "sha256", "files", "tokens", "dropped")}))
    torch.manual_seed(args.seed)
    model = Llama()
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [args.muon_lr, args.adam_lr]
    state = {"step": 0, "seconds": 0.0, "tokens": 0, "library": 0}  # "library": tokens that were not from tests
    checkpoint = out / "checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, s in zip(optimizers, saved["optimizers"], strict=True):
            opt.load_state_dict(s)
        state = saved["state"]
    rng = np.random.default_rng([args.seed, int(state["step"]), rank])
    streams = {g: Stream(data[g], rng) for g in ("train", "tests")}
    splitter = IndentSplitter(tok, rng)
    valid = np.concatenate([*data["valid"], [EOS]])
    run = torch.compile(model, dynamic=False) if args.compile else model
    cast = torch.autocast("cpu", torch.bfloat16) if args.bf16 else nullcontext()
    recent: deque[float] = deque(maxlen=101)
    total = args.minutes * 60
    next_eval = state["seconds"] + args.eval_minutes * 60
    next_save = state["seconds"] + args.first_save_minutes * 60
    running: list[float] = []
    length, norm, pending = args.length, torch.tensor(0.0), 0.0

    def save() -> None:
        part = checkpoint.with_suffix(".part")
        torch.save({"model": model.state_dict(), "state": state, "optimizers": [opt.state_dict() for opt in optimizers]}, part)
        part.replace(checkpoint)

    while True:
        progress = state["seconds"] / total
        began = time.perf_counter()
        last = progress >= 1
        if not last:
            for opt, lr in zip(optimizers, base, strict=True):
                for group in opt.param_groups:
                    group["lr"] = lr * shape(progress)
            length = CONTEXT if progress >= args.long_from else args.length
            share = 0.65 if progress < 0.4 else 0.85
            parts = max(1, args.batch_tokens // args.micro_tokens // ranks)
            for _ in range(parts):
                windows = []
                for _ in range(max(1, args.micro_tokens // length)):
                    kind = "train" if rng.random() < share else "tests"
                    state["library"] += ranks * length * (kind == "train")
                    windows.append(splitter(streams[kind].next(length)))
                batch = torch.from_numpy(np.stack(windows))
                with cast:
                    loss = run(batch[:, :-1], batch[:, 1:])
                (loss / parts).backward()
                running.append(loss.item())
            if ranks > 1:
                pending = average(model, pending, ranks)
            state["seconds"] += pending  # of the step before: all processes add the same
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in optimizers:
                opt.step()
                opt.zero_grad()
            state["step"] += 1
            state["tokens"] += parts * args.micro_tokens * ranks
            # A pause of the process, or a rush on the machine, must not jump the schedule.
            recent.append(time.perf_counter() - began)
            pending = min(recent[-1], 3 * statistics.median(recent))
        if last or state["seconds"] >= next_eval:
            next_eval = state["seconds"] + args.eval_minutes * 60
            score = losses(model, valid, length, None if last else CONTEXT * 16 // length).mean()
            line = {
                "minutes": round(state["seconds"] / 60, 2),
                "step": state["step"],
                "tokens": state["tokens"],
                "train": round(float(np.mean(running)), 4),
                "valid": round(float(score), 4),
                "length": length,
                "rate": round(shape(progress), 3),
                "norm": round(float(norm), 3),
                "per_second": round(args.batch_tokens / statistics.median(recent)),
            }
            running.clear()
            if rank == 0:
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
        if last or state["seconds"] >= next_save:
            next_save = state["seconds"] + args.save_minutes * 60
            if rank == 0:
                save()
        if last:
            break
    if rank == 0:
        export(out, out / "model")


# ---------------------------------------------------------------- export


def export(out: Path, folder: Path) -> None:
    """Write the checkpoint in `out` as a folder that transformers and Quire load."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    weights = {name: t.to(torch.bfloat16).contiguous() for name, t in saved.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "rms_norm_eps": NORM_EPS,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": True,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0",
    }
    # Sampled, not greedy, unless asked for: a small model repeats itself otherwise.
    generation = {
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "transformers_version": "4.57.0",
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    special = {"content": EOS_TEXT, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": EOS_TEXT,
        "eos_token": EOS_TEXT,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(EOS): special},
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in (("config.json", config), ("generation_config.json", generation), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes())
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    print(f"{folder}: {size:,} bytes, {sum(t.numel() for t in weights.values()):,} parameters")


def load_exported(folder: Path) -> Llama:
    """The exported weights (rounded to bfloat16), computed with in float32."""
    model = Llama()
    weights = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name: t.float() for name, t in weights.items()})
    return model.eval()


# ---------------------------------------------------------------- report


class NGram:
    """Interpolated absolute discounting up to trigrams: each order takes a discount off
    its counts and gives that mass to the order below, down to a uniform distribution."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tables = []
        for order in (1, 2, 3):
            keys, counts = np.unique(self.keys(tokens, order), return_counts=True)
            heads, inverse, kinds = np.unique(keys // VOCAB, return_inverse=True, return_counts=True)
            self.tables.append((keys, counts, heads, np.bincount(inverse, counts), kinds))

    @staticmethod
    def keys(tokens: np.ndarray, order: int) -> np.ndarray:
        """One number per predicted token (all but the first) and its context."""
        padded = np.concatenate([[EOS], tokens])
        return sum(padded[2 - i : len(padded) - i] * VOCAB**i for i in range(order))

    def losses(self, tokens: np.ndarray, discounts: list[float]) -> np.ndarray:
        """Loss in nats per predicted token, of the order that `discounts` is long."""
        p = np.full(len(tokens) - 1, 1 / VOCAB)
        for order, discount in enumerate(discounts, start=1):
            keys, counts, heads, totals, kinds = self.tables[order - 1]
            query = self.keys(tokens, order)

            def look(table: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
                at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
                return np.where(table[at] == wanted, values[at], 0)

            count, total = look(keys, counts, query), look(heads, totals, query // VOCAB)
            rest = discount * look(heads, kinds, query // VOCAB)
            mixed = (np.maximum(count - discount, 0) + rest * p) / np.maximum(total, 1)
            p = np.where(total > 0, mixed, p)
        return -np.log(p)

    @classmethod
    def fitted(cls, docs: list[np.ndarray], more: list[np.ndarray]) -> tuple[NGram, list[float]]:
        """Trained on both, the discounts chosen on every tenth document of `docs`."""
        tune = np.concatenate(docs[::10])
        part = cls(np.concatenate([d for i, d in enumerate(docs) if i % 10] + more))
        chosen: list[float] = []
        for _ in range(3):
            grid = [[*chosen, d / 20] for d in range(2, 20)]
            chosen = min(grid, key=lambda g: part.losses(tune, g).mean())
        return cls(np.concatenate(docs + more)), chosen


def first_block(text: str) -> str | None:
    """The leading top-level statement of a completion; None if nothing follows its header."""
    lines = text.split("\n")[:-1] if not text.endswith("\n") else text.split("\n")
    for at, line in enumerate(lines[1:], start=1):
        if line and not line[0].isspace():
            lines = lines[:at]
            break
    return "\n".join(lines) + "\n" if any(line.strip() for line in lines[1:]) else None


def parses(text: str) -> bool:
    block = first_block(text)
    try:
        ast.parse(block or "(")
    except (SyntaxError, ValueError):
        return False
    return True


def function_headers(texts: list[str], count: int) -> list[str]:
    """Headers of functions (`def ...:`), spread evenly over the held-out files."""
    headers = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
                header = textwrap.dedent("".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
                if header.rstrip().endswith(":") and header.count("\n") == 1:
                    headers.append(header.rstrip())
    return headers[:: max(1, len(headers) // count)][:count]


def report(out: Path) -> None:
    """Print, in Markdown, how good OUT/model is; the figures go to report.json as well."""
    tok, data, info = load_data(out)
    model = load_exported(out / "model")
    valid = np.concatenate([*data["valid"], [EOS]])
    per_byte = 1 / math.log(2) / info["bytes"]["valid"]
    figures: dict[str, object] = {"tokens": info["tokens"], "predicted": len(valid) - 1}

    def row(name: str, loss: np.ndarray) -> None:
        figures[name] = [float(loss.mean()), float(loss.sum() * per_byte)]
        print(f"| {name} | {loss.mean():.3f} | {math.exp(loss.mean()):.1f} | {loss.sum() * per_byte:.3f} |")

    print("| Predictor | nats/token | perplexity | bits/byte |\n|---|---:|---:|---:|")
    for name, more in (("library", []), ("library + tests", data["tests"])):
        ngram, discounts = NGram.fitted(data["train"], more)
        figures[f"discounts, {name}"] = discounts
        row(f"bigram, {name}", ngram.losses(valid, discounts[:2]))
        row(f"trigram, {name}", ngram.losses(valid, discounts))
    loss = losses(model, valid, CONTEXT)
    row("embedded model, windows of 2,048", loss)
    row("embedded model, windows of 512", losses(model, valid, 512))
    print("\n| Position in the window | nats/token |\n|---|---:|")
    position = np.arange(len(loss)) % CONTEXT
    for low, high in ((0, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 1536), (1536, 2048)):
        mean = float(loss[(position >= low) & (position < high)].mean())
        figures[f"position {low}"] = mean
        print(f"| {low:,} to {high - 1:,} | {mean:.3f} |")
    headers = function_headers([tok.decode(doc[1:].tolist()) for doc in data["valid"]], 50)
    print(f"\n| Temperature | completions of {len(headers)} held-out function headers that parse |\n|---|---:|")
    for temperature in (0.0, 0.2, 0.8):
        good = sum(parses(h + complete(model, tok, h, 96, temperature, seed)) for seed, h in enumerate(headers))
        figures[f"parses at {temperature}"] = good / len(headers)
        print(f"| {temperature} | {good} of {len(headers)} |", flush=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    print("\n| minute | tokens, millions | learning rate | training loss | validation loss |\n|---:|---:|---:|---:|---:|")
    for line in [*log[: -1 : max(1, len(log) // 16)], log[-1]]:
        print(f"| {line['minutes']:.0f} | {line['tokens'] / 1e6:.2f} | {line['rate']:.2f} | {line['train']:.3f} | {line['valid']:.3f} |")
    for prompt in PROMPTS:
        for temperature in (0.0, 0.2, 0.8):
            text = complete(model, tok, prompt, 96, temperature)
            print(f"\nPrompt {json.dumps(prompt)}, temperature {temperature}:\n\n```python\n{prompt}{text}\n```")
    (out / "report.json").write_text(json.dumps(figures, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Quire's embedded model.")
    parser.add_argument("--out", required=True, help="working folder")
    parser.add_argument("--minutes", type=float, default=80, help="training time")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--export", metavar="DIR", help="write the checkpoint as a model folder")
    parser.add_argument("--report", action="store_true", help="evaluate OUT/model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="window in most of the training")
    parser.add_argument("--long-from", type=float, default=0.8, help="progress at which windows become the whole context")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="tokens per forward pass")
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens per update")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--eval-minutes", type=float, default=2)
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--first-save-minutes", type=float, default=3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile (needs a C++ compiler)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(out, Path(args.export))
    elif args.report:
        report(out)
    else:
        train(args)


if __name__ == "__main__":
    main()
