"""Every error that a user can meet: a code, what is wrong (with the numbers), and what to do about it.

The command line prints ``message`` and exits with ``exit_code``; the server answers with ``status`` and an error body
that carries ``message``, ``param`` and ``code``. Nothing else of an exception ever reaches a user.
"""

from __future__ import annotations

from copy import copy
from typing import Self


class QuireError(Exception):
    """Base of all errors meant for users. ``message`` is a whole sentence that can be shown as it is."""

    code = "internal_error"
    status = 500
    exit_code = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def said(self, message: str, param: str | None) -> Self:
        """The same error in other words."""
        made = copy(self)
        made.args, made.message, made.param = (message,), message, param
        return made


class InvalidRequestError(QuireError):
    """A request that can't be served as it is asked: a parameter, a prompt, a body."""

    code = "invalid_request"
    status = 400


class ContextLengthError(InvalidRequestError):
    """Prompt and output together are longer than the context (or than the KV pool)."""

    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = None, prompt: int | None = None, most: int | None = None) -> None:
        """prompt: its tokens, where it is too long by itself. most: how many it may have."""
        super().__init__(message, param=param)
        self.prompt = prompt
        self.most = most


class ModelNotFoundError(QuireError):
    """The request names a model that this server does not serve."""

    code = "model_not_found"
    status = 404


class QueueFullError(QuireError):
    """More requests wait than the engine was told to keep waiting. Trying again later helps."""

    code = "queue_full"
    status = 429


class ConfigError(QuireError):
    """An option of the command line, the environment, the configuration file or ``LLM(...)``."""

    code = "invalid_config"
    status = 400
    exit_code = 2


class ModelLoadError(QuireError):
    """A model folder that can't be loaded: a file is missing, cut short, misshapen or of an unsupported kind."""

    code = "model_load_failed"


class CapacityError(QuireError):
    """Something does not fit into the memory that it was given."""

    code = "out_of_memory"


class EngineError(QuireError):
    """The engine could not finish a request's work. The request is lost, the engine goes on."""

    code = "engine_error"


class StepMemoryError(EngineError):
    """The device has no memory left for a step as large as this one. Nothing of it counts; a smaller one may do."""
