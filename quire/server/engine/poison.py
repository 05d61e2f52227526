"""For tests of the supervisor, only with --kv-debug, and where the environment says so.

QUIRE_TEST_CRASH_TOKEN=1234: a request that kills every engine that computes it, as one that meets a bug in a kernel would. The engine is
gone, without a word, in the step that begins a request whose prompt holds that token.

QUIRE_TEST_STOP_AFTER=100: the engine stands still (SIGSTOP) after its first so many steps, until somebody lets it go on (SIGCONT). So a
test finds it in the middle of its work, on however fast a machine.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from quire.config import EngineConfig
from quire.core.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from quire.core.engine import Executor

CRASH_TOKEN, STOP_AFTER = "QUIRE_TEST_CRASH_TOKEN", "QUIRE_TEST_STOP_AFTER"


class PoisonedBackend:
    """A backend that kills its process where a prompt holds ``token``, and stops it after ``steps`` steps."""

    overlaps = False

    def __init__(self, backend: Executor, token: int | None, steps: int | None) -> None:
        self._backend, self._token, self._steps = backend, token, steps
        self.spec, self.groups = backend.spec, backend.groups
        self.num_blocks, self.num_host_blocks, self.block_size = backend.num_blocks, backend.num_host_blocks, backend.block_size
        self.max_model_len = backend.max_model_len

    def execute(self, plan: StepPlan) -> StepResult:
        if any(self._token in start.tokens[: start.num_prompt] for start in plan.starts):
            os.kill(os.getpid(), signal.SIGUSR1)  # it ends the process, as SIGSEGV would, and leaves no core file
        if self._steps is not None:
            if self._steps == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            self._steps -= 1
        return self._backend.execute(plan)


def poisoned(backend: Executor, config: EngineConfig) -> Executor:
    """``backend`` itself, unless a test wants it otherwise."""
    token, steps = _number(CRASH_TOKEN), _number(STOP_AFTER)
    return PoisonedBackend(backend, token, steps) if config.kv_debug and (token, steps) != (None, None) else backend


def _number(variable: str) -> int | None:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else None
