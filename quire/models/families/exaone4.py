"""EXAONE 4 (arXiv 2507.11407, section 2.1): Llama with RMS norms of heads, and of what attention and feed-forward give in place of those of
what they take. In the large one three of four layers have a window, and only those rotate.
"""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family
from quire.models.families.llama import BUFFERS, read_decoder, read_layer_types
from quire.models.families.olmo import sources_behind
from quire.models.families.rotations import GLOBAL, LOCAL
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    absent = "sliding_window" not in config.values
    window = 4096 if absent else config.integer("sliding_window", 0, low=0, high=MAX_POSITIONS)  # null: layers rotate, and see everything
    local = [kind == LOCAL for kind in _types(config, window)]
    spec = read_decoder(
        config, "Exaone4ForCausalLM", kv_heads=32, max_positions=2048, head_norm=True, eps=1e-5,
        windows=tuple(window if each else 0 for each in local),
    )  # fmt: skip
    ropes = tuple(spec.rope if each else None for each in local)
    return replace(spec, norm_place="behind", ropes=ropes if window and None in ropes else ())


def _types(config: Config, window: int) -> list[str]:
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    types = read_layer_types(config, layers)
    if types is None:
        pattern = config.values.get("sliding_window_pattern", 4)
        if isinstance(pattern, str):
            config.refuse(f"'sliding_window_pattern' {pattern!r:.40} without 'layer_types' is not supported")
        every = config.integer("sliding_window_pattern", 4, high=MAX_LAYERS) if window else 1
        types = [GLOBAL if (i + 1) % every == 0 else LOCAL for i in range(layers)]
    if LOCAL in types and not window:
        config.refuse(f"'layer_types' names {LOCAL}, but 'sliding_window' turns it off")
    return types


FAMILIES = (Family("Exaone4ForCausalLM", "exaone4", _read, sources_behind, ("model.",), BUFFERS),)
