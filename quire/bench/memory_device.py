"""What quire bench memory runs on: no device at all, or a model; in both, outputs are forced to their lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import quire
from quire.bench.memory_load import Layout, Load, engine_config, unit
from quire.config import EngineConfig
from quire.core.engine import Executor
from quire.core.plan import StepPlan, StepResult
from quire.models.weights import load_spec, resolve_model
from quire.text.tokenizer import Tokenizer
from quire.workload import TraceRequest, prompt_token_ids

_TOKENS = 1 << 30


@dataclass(slots=True, frozen=True)
class Words:
    """A vocabulary that is so large that random prompts have nothing in common by chance."""

    vocab_size: int = _TOKENS


class NoModel:
    """A device of ``num_blocks`` blocks that computes nothing. Its tokens depend on the row's seed and the position, so that
    no two samples are alike."""

    overlaps = False

    def __init__(self, num_blocks: int, block_size: int, max_model_len: int) -> None:
        self.spec = Words()
        self.num_blocks = num_blocks
        self.num_host_blocks = 0
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.window = 0
        self._bases: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        bases = self._bases
        for start in plan.starts:
            bases[start.row] = start.seed * 0xD1B54A32D192ED03 >> 32
        tokens = [(bases[work.row] + work.start + work.count) % _TOKENS for work in plan.work if work.sample]
        return StepResult(tokens, [None] * len(tokens))


class Forced:
    """Ends every sequence at its length, with an end-of-text token, as if the model had chosen it: the engine does not know when.

    lengths: a sequence's seed → tokens that it generates. The requests must keep the model from ending them earlier
    (``min_tokens``). ``watch`` sees every plan after it was executed.
    """

    overlaps = False

    def __init__(self, device: Executor, lengths: Mapping[int, int], eos: int) -> None:
        self.spec = device.spec
        self.num_blocks = device.num_blocks
        self.num_host_blocks = device.num_host_blocks
        self.block_size = device.block_size
        self.max_model_len = device.max_model_len
        self.window = device.window
        self.watch: Callable[[StepPlan], None] = lambda plan: None
        self._device = device
        self._lengths = lengths
        self._eos = eos
        self._ends: dict[int, int] = {}
        """Row → tokens that it has at its end, less one."""
        self._beams: set[int] = set()

    def execute(self, plan: StepPlan) -> StepResult:
        ends = self._ends
        for start in plan.starts:
            ends[start.row] = start.num_prompt + self._lengths[start.seed] - 1
            (self._beams.add if start.num_candidates else self._beams.discard)(start.row)
        result = self._device.execute(plan)
        sampled = [work for work in plan.work if work.sample]
        for i, work in enumerate(sampled):
            if work.start + work.count >= ends[work.row]:
                self._end(i, work.row, result)
        self.watch(plan)
        return result

    def _end(self, i: int, row: int, result: StepResult) -> None:
        if row in self._beams:
            entry = result.logprobs[i]
            assert entry is not None, "a beam's row reports its candidates"
            entry.top = [(self._eos, 0.0)]
        else:
            result.tokens[i] = self._eos


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
