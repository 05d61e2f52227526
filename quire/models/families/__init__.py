"""The architectures that Quire knows: config.json → TransformerSpec, canonical tensor names → checkpoint names.

A new architecture is one small file with a ``FAMILIES`` tuple, listed below. Whatever a family does not compute it must
refuse by name: a model that loads and answers wrongly is worse than one that does not load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire.errors import InvalidRequestError, ModelLoadError
from quire.models.families import (
    ernie,
    ernie_moe,
    exaone4,
    gemma,
    gemma3,
    glm,
    glm_moe,
    gpt2,
    gpt_oss,
    granite,
    helium,
    llama,
    mistral,
    olmo,
    opt,
    phi3,
    qwen,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from quire.models.families.base import Config, Family, Source
from quire.models.families.packing import Packing, packing_of
from quire.models.spec import TransformerSpec
from quire.sampling_params import SamplingParams

__all__ = ["FAMILIES", "Config", "Family", "Packing", "Source", "find_family", "packing_of", "spec_from_config"]

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for module in (llama, mistral, qwen, gemma, gemma3, gpt_oss, granite, olmo, exaone4, glm, glm_moe, ernie, ernie_moe, seed_oss, phi3,
                   smollm3, helium, starcoder2, stablelm, gpt2, opt)
    for family in module.FAMILIES
}  # fmt: skip
"""Architecture name → family."""
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of generation_config.json that are taken as defaults, as vLLM does."""


def find_family(values: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a configuration: by ``architectures``, or by ``model_type`` where it has none. Raises ModelLoadError."""
    supported = ", ".join(sorted(FAMILIES))
    names = values.get("architectures")
    if names:
        name = names[0] if isinstance(names, list) else names
        if isinstance(name, str) and name in FAMILIES:
            family, kind = FAMILIES[name], values.get("model_type")
            if kind not in (None, family.model_type):  # transformers goes by this one
                raise ModelLoadError(f"{where}: model_type {kind!r} is not that of {name}, which is {family.model_type!r}")
            return family
        raise ModelLoadError(f"{where}: architecture {name!r} is not supported; supported: {supported}")
    kind = values.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == kind:
            return family
    raise ModelLoadError(f"{where}: no 'architectures', and model_type {kind!r} is not supported; supported: {supported}")


def spec_from_config(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config.json") -> TransformerSpec:
    """TransformerSpec of a parsed config.json, as transformers 4 or 5 writes it.

    generation: the parsed generation_config.json; its end-of-text ids come first, those of config.json are added. Its
    sampling parameters become the model's defaults.
    Raises ModelLoadError, naming ``where`` and the field, for whatever is missing, malformed or not supported.
    """
    family = find_family(values, where)
    config = Config(values, where)
    config.unsupported(is_causal=True)
    packing = packing_of(config)
    spec = family.read(config)
    generated = Config(generation or {}, where.replace("config.json", "generation_config.json"))
    sayings = [generated, config]
    if isinstance(text := values.get("text_config"), dict):  # a part, where the whole may say nothing
        sayings.append(Config(text, f"{where}, text_config"))
    eos = dict.fromkeys(i for each in sayings for i in _token_ids(each, "eos_token_id"))
    bos = [*(i for each in sayings for i in _token_ids(each, "bos_token_id")), None]
    # An id outside the vocabulary (a small model saved with its class's defaults) can't be generated: nothing to stop at.
    known = tuple(i for i in eos if i < spec.vocab_size)
    return replace(
        spec,
        stored=packing.stored(spec) if packing is not None else (),
        eos_token_ids=known,
        bos_token_id=bos[0] if bos[0] is not None and bos[0] < spec.vocab_size else None,
        sampling_defaults=_sampling_defaults(generated),
    )


def _sampling_defaults(generation: Config) -> tuple[tuple[str, float], ...]:
    """What generation_config.json recommends. ``do_sample`` is not looked at: transformers' own default, not the model's."""
    found = {name: value for name in SAMPLING_DEFAULTS if (value := generation.values.get(name)) is not None}
    try:
        SamplingParams(**found)
    except InvalidRequestError as e:
        generation.refuse(e.message)
    return tuple(found.items())


def _token_ids(config: Config, name: str) -> tuple[int, ...]:
    value = config.values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            config.refuse(f"{name!r} must be a token id or a list of them, got {value!r}")
    return tuple(i for i in ids if i >= 0)  # some files write -1 for "none"
