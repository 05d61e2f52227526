"""The Backend protocol, and the one place that opens a backend for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from quire.config import EngineConfig
from quire.core.groups import KVGroups
from quire.core.plan import StepPlan, StepResult
from quire.errors import ConfigError
from quire.models.spec import TransformerSpec


class Backend(Protocol):
    """Executes step plans on a device. Holds the weights, the KV pool and a table of ``max_num_seqs`` rows."""

    spec: TransformerSpec
    folder: Path
    """Of the model; the tokenizer is there too."""
    num_blocks: int
    num_host_blocks: int
    """Blocks of the swap pool; their ids follow those of the KV pool."""
    block_size: int
    groups: KVGroups
    """Of the model's layers, by how far they look back: a block holds the keys and values of one of them."""
    kv_layers: int
    """Layers of such a group, all of the model's where there is one."""
    memory_note: str
    """How the size of the KV pool was found, with the arithmetic; empty where it was stated."""
    arithmetic: str
    """What the linears multiply: float32, bfloat16, float16 or int8."""
    weight_note: str
    """How the weights are quantized; empty where they are not."""
    max_model_len: int
    """Most tokens of a sequence: the model's context or the user's smaller limit."""
    overlaps: bool
    """The engine is to ``launch`` and ``collect`` steps: this is an OverlappingBackend. Else it executes them one by one."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Blocks until its tokens are known. Raises EngineError only when the device is unusable, and StepMemoryError where
        it has no memory for a step of this size: copies are done then, and all rows of the plan will be started anew."""
        ...

    def limits(self) -> tuple[float, float]:
        """Measured limits of the device: memory read bandwidth in bytes/s; operations/s (two for each multiply-add) in what the
        linears compute with, ``arithmetic``."""
        ...

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        ...

    def head_bytes(self) -> int:
        """Of which only a step with a row of logits reads (lm_head)."""
        ...

    def expert_bytes(self) -> int:
        """Of which a step reads a part: those of the experts that its positions take. 0 where there are none."""
        ...


class OverlappingBackend(Backend, Protocol):
    """A backend whose device works beside the host: a step is launched before the tokens of the one before it are read.

    The device does steps whole and in the order of their launches, copies included. So a plan may hand out blocks and rows that an
    earlier step in flight still uses, and its rows may need tokens that an earlier step samples: those are on the device by then, and
    the plan does not bring them. A step is launched while at most one is in flight, which is collected then.
    """

    def launch(self, plan: StepPlan) -> Any:
        """Give the device one step. Returns, as soon as it has the work, what ``collect`` is to be called with.

        The tables of rows are those after the step from here on (one token longer for each row that samples, what follows a draft
        excepted), for the next plan may start another sequence in a row of this one. A row that fails goes on with any token of the
        vocabulary until a plan starts another in it: its next step may be in flight. What is sampled under a mask, after a draft or
        as candidates is collected before the row's next step is launched. The plan's lists of tokens grow after this returns.
        Raises EngineError as ``execute`` does.
        """
        ...

    def collect(self, pending: Any) -> StepResult:
        """The result of a launched step; each is collected once, the oldest first. Blocks until its tokens are on the host. Changes
        nothing that a later step reads. ``sample_s`` is 0: what the engine times is how long it waits."""
        ...


Report = Callable[[str, float], None]
"""Called after each phase of loading with its name and seconds."""


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Around an import of the CPU backend: where that fails, a ConfigError says why."""
    try:
        yield
    except ModuleNotFoundError as e:
        raise ConfigError(f"the CPU backend is not complete: {e}; install Quire with `pip install .`, which compiles it") from None
    except ImportError as e:  # QUIRE_ISA names an instruction set that this machine lacks
        raise ConfigError(str(e)) from None


def open_backend(config: EngineConfig, report: Report | None = None) -> Backend:
    """Load ``config.model`` onto ``config.device`` and allocate its KV pool.

    Raises ModelLoadError (folder, files, tensors), ConfigError (options), CapacityError (the pool holds no request).
    """
    if config.device == "cpu":
        with cpu_kernels():
            from quire.backends.cpu.backend import CpuBackend
        return CpuBackend.open(config, report)
    from quire.backends.cuda.device import open_device

    open_device(config.device)  # says what is missing, before anything that needs it is imported
    from quire.backends.cuda.opening import open_cuda

    return open_cuda(config, report)
