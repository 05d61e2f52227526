"""For tests of the supervisor: a request that kills every engine that computes it, as one that meets a bug in a kernel would.

Only with --kv-debug, where the environment names a token: QUIRE_TEST_CRASH_TOKEN=1234. The engine is gone, without a word, in the step
that begins a request whose prompt holds it.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from quire.config import EngineConfig
from quire.core.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from quire.core.engine import Executor

VARIABLE = "QUIRE_TEST_CRASH_TOKEN"


class PoisonedBackend:
    """A backend that kills its process where a prompt holds ``token``."""

    overlaps = False

    def __init__(self, backend: Executor, token: int) -> None:
        self._backend, self._token = backend, token
        self.spec, self.window = backend.spec, backend.window
        self.num_blocks, self.num_host_blocks, self.block_size = backend.num_blocks, backend.num_host_blocks, backend.block_size
        self.max_model_len = backend.max_model_len

    def execute(self, plan: StepPlan) -> StepResult:
        if any(self._token in start.tokens[: start.num_prompt] for start in plan.starts):
            os.kill(os.getpid(), signal.SIGUSR1)  # it ends the process, as SIGSEGV would, and leaves no core file
        return self._backend.execute(plan)


def poisoned(backend: Executor, config: EngineConfig) -> Executor:
    """``backend`` itself, unless a test wants it otherwise."""
    token = os.environ.get(VARIABLE, "")
    return PoisonedBackend(backend, int(token)) if config.kv_debug and token.isdecimal() else backend
