"""How layers rotate where some look at a window and others see everything (Gemma 3, OLMo 3): each kind has parameters of its own."""

from __future__ import annotations

from quire.models.families.base import Config

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""Types of layers in config.json."""


def read_rotations(config: Config, local_theta: str) -> tuple[Config, Config]:
    """The configuration for layers that see everything, and for those with a window, with the rotation where Llama has its own
    (read_rope reads it there).

    transformers 4 has ``rope_theta`` and ``rope_scaling``, which concern layers that see everything; others rotate by the field
    ``local_theta``. transformers 5 has an object of parameters for either kind, and those fields are what it leaves out. Both fields
    must be there.
    """
    values = {name: value for name, value in config.values.items() if name != "rope_parameters"}
    parameters = config.values.get("rope_parameters")
    if parameters is None:
        return Config(values, config.where), Config({"rope_theta": config.number(local_theta, low=1.0)}, config.where)
    if config.values.get("rope_scaling") is not None:
        config.refuse("'rope_scaling' and 'rope_parameters' contradict each other; keep one of them")
    thetas = {LOCAL: local_theta, GLOBAL: "rope_theta"}
    if not isinstance(parameters, dict) or not set(parameters) <= set(thetas):
        config.refuse(f"'rope_parameters' must have an object for {GLOBAL} and one for {LOCAL}")
    beside = {name: value for name, value in values.items() if name != "rope_theta"}
    found = {}
    for kind, theta in thetas.items():
        inner = parameters.get(kind) or {}
        if not isinstance(inner, dict):
            config.refuse(f"'rope_parameters', {kind!r} must be an object, got {inner!r:.80}")
        given = {name: value for name, value in inner.items() if value is not None}
        found[kind] = Config(beside | {"rope_parameters": {"rope_theta": config.number(theta, low=1.0), **given}}, config.where)
    return found[GLOBAL], found[LOCAL]
