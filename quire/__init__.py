"""Quire: a server for language models whose KV cache is paged.

``from quire import LLM, SamplingParams, Structured`` is the offline API; they are imported when they are first used, so that
``import quire`` costs milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "Structured", "__version__"]

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.sampling_params import SamplingParams
    from quire.structured import Structured


def __getattr__(name: str) -> object:
    if name == "LLM":
        from quire.llm import LLM

        return LLM
    if name == "SamplingParams":
        from quire.sampling_params import SamplingParams

        return SamplingParams
    if name == "Structured":
        from quire.structured import Structured

        return Structured
    raise AttributeError(f"module 'quire' has no attribute {name!r}")
