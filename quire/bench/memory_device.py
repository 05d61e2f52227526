"""What quire bench memory runs on: no device at all, or a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import quire
from quire.bench.memory_load import Layout, Load, engine_config, unit
from quire.config import EngineConfig
from quire.core.engine import Executor
from quire.models.weights import load_spec, resolve_model
from quire.simulator.devices import NoModel
from quire.text.tokenizer import Tokenizer
from quire.workload import TraceRequest, prompt_token_ids


@dataclass(slots=True, frozen=True)
class Device:
    """What an engine runs on, and how."""

    executor: Executor
    config: EngineConfig
    eos: tuple[int, ...]
    """Tokens that end a text."""
    prompt: Callable[[TraceRequest, int], list[int]]
    """A request and its number → its prompt."""


def open_device(load: Load, layout: Layout) -> Device:
    """With the pool of ``load``. Raises what opening a model raises."""
    blocks, config = load.pool // unit(load, layout), engine_config(load, layout)
    if load.model is not None:
        return _open_model(load, load.model, config, blocks)
    device = NoModel(blocks, unit(load, layout), load.max_len)
    vocab_size = device.spec.vocab_size
    return Device(device, config, (vocab_size - 1,), lambda work, number: prompt_token_ids(work, number, vocab_size, load.seed))


def _open_model(load: Load, model: str, config: EngineConfig, blocks: int) -> Device:
    from quire.llm import LLM

    spec = load_spec(resolve_model(model))
    size = blocks * config.block_size * spec.kv_bytes_per_token(config.kv_width(spec.dtype))
    config = replace(config, model=model, kv_memory=str(size))
    llm = LLM.from_config(config)
    text = _text(llm.tokenizer)

    def prompt(work: TraceRequest, number: int) -> list[int]:
        if work.prefix_ids is not None:
            return prompt_token_ids(work, number, llm.backend.spec.vocab_size, load.seed)
        start = int(Random(f"{load.seed}/{number}").random() * len(text))
        return [text[(start + i) % len(text)] for i in range(work.prompt_tokens)]

    return Device(llm.backend, config, llm.backend.spec.eos_token_ids or (0,), prompt)


def _text(tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text to cut prompts from: Quire's own source. After random tokens a model is at a loss, and its beams part
    sooner than after text."""
    files = sorted(Path(quire.__file__).parent.rglob("*.py"))
    return [token for file in files for token in tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False)]
