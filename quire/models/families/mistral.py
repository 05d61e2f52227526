"""Mistral 7B, NeMo and their relatives: Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    # null is full attention; an absent field is what the transformers class defaults to.
    absent = "sliding_window" not in config.values
    window = 4096 if absent else config.integer("sliding_window", 0, high=MAX_POSITIONS)
    kind = "sliding_attention" if window else "full_attention"
    if (types := config.values.get("layer_types")) is not None and types != [kind] * layers:
        config.refuse("'layer_types' that differ between layers or contradict 'sliding_window' are not supported for MistralForCausalLM")
    return read_decoder(config, "MistralForCausalLM", kv_heads=8, max_positions=131072, windows=(window,) * layers)


FAMILIES = (Family("MistralForCausalLM", "mistral", _read, decoder_sources, ("model.",), BUFFERS),)
