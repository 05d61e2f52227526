"""What a family is: how to read its config.json, and where the canonical tensors are in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from quire.errors import ModelLoadError
from quire.models.spec import Activation, TransformerSpec

# Limits far above any model that fits one machine, low enough that no number in a file can make us loop or allocate for long.
MAX_LAYERS: Final = 4096
MAX_EXPERTS: Final = 1024
MAX_ALL_EXPERTS: Final = 1 << 16  # of all layers: each has tensors of its own
MAX_WIDTH: Final = 1 << 22
MAX_POSITIONS: Final = 1 << 30

ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
DTYPES: Final = ("float32", "float16", "bfloat16")


@dataclass(slots=True, frozen=True)
class Config:
    """A parsed config.json, read with care: every access checks type and range, every error names the file and the field.

    ``null`` counts as absent; a field that means something else by ``null`` is looked up in ``values``. Fields that nobody
    reads are ignored: they describe training, caching, or another program.
    """

    values: Mapping[str, Any]
    where: str = "config.json"
    """How messages call the file."""

    def refuse(self, problem: str) -> NoReturn:
        raise ModelLoadError(f"{self.where}: {problem}")

    def _get(self, name: str, required: bool) -> Any:
        value = self.values.get(name)
        if value is None and required:
            self.refuse(f"{name!r} is missing")
        return value

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_WIDTH) -> int:
        """An integer in ``low..high``; required unless there is a default."""
        value = self._get(name, default is None)
        if value is None:
            assert default is not None
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(f"{name!r} must be an integer from {low} to {high}, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e30) -> float:
        """A finite number with ``low < number <= high``; required unless there is a default."""
        value = self._get(name, default is None)
        if value is None:
            assert default is not None
            return default
        # NaN and infinities fail the comparison, which is exact for an int that no float can hold.
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            self.refuse(f"{name!r} must be a number above {low:g} and at most {high:g}, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(f"{name!r} must be true or false, got {value!r}")
        return value

    def activation(self, name: str, default: str) -> Activation:
        value = self.values.get(name) or default
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.refuse(f"{name} {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def dtype(self) -> str:
        """Width of the checkpoint; ``torch_dtype`` is its older name. float32 where the file says nothing, as in transformers."""
        value = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in DTYPES:
            self.refuse(f"dtype {value!r} is not supported; supported: {', '.join(DTYPES)}")
        return str(name)

    def unsupported(self, **harmless: Any) -> None:
        """Refuse each named field unless it is absent, null or the given harmless value."""
        for name, value in harmless.items():
            found = self.values.get(name)
            if found is not None and found != value:
                self.refuse(f"{name} {found!r:.80} is not supported" + (f" (only {value!r})" if value is not None else ""))


@dataclass(slots=True, frozen=True)
class Source:
    """Where a canonical tensor is in a checkpoint: the tensor ``name``, one expert of it, transposed, then ``rows`` of its first axis."""

    name: str
    """Without the family's prefix."""
    transpose: bool = False
    rows: tuple[int, int] | tuple[int, int, int] | None = None
    """First and one past the last row, and the step from one to the next, where several canonical tensors are fused into one."""
    rows_total: int = 0
    """Rows of the fused tensor."""
    expert: tuple[int, int] | None = None
    """Which of how many, where the linears of all experts are one tensor of three axes."""
    interleaved: tuple[int, int] | None = None
    """Heads, and how many leading dimensions of each, whose rows (of a linear's outputs) are stored in the order of the original rotary
    code: the two dimensions that are turned together are neighbours, and not half of what is turned apart."""

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the checkpoint must have for the canonical tensor to have ``shape``."""
        if self.rows is not None:
            shape = (self.rows_total, *shape[1:])
        if self.transpose:
            shape = shape[::-1]
        return shape if self.expert is None else (self.expert[1], *shape)


@dataclass(slots=True, frozen=True)
class Family:
    """One architecture: everything about it that is not in TransformerSpec."""

    architecture: str
    """The class name in ``architectures``."""
    model_type: str
    """For configurations that name no architecture."""
    read: Callable[[Config], TransformerSpec]
    sources: Callable[[TransformerSpec], dict[str, Source]]
    """Canonical name → source, for exactly the names of ``spec.tensor_shapes()``."""
    prefixes: tuple[str, ...]
    """A checkpoint's names start with one of these, or with none; the first that fits is cut off."""
    buffers: str = r"(?!)"
    """Regular expression (full match, prefix cut off) of tensors that old checkpoints hold and that carry no information, or that belong to
    what is not served (layers that guess further tokens)."""
    guesses: str = ""
    """A tensor by which a checkpoint's layer is known to be no layer of the model: one behind them that guesses a further token, which is
    left out (GLM-4.5)."""

    def strip(self, name: str) -> str:
        for prefix in self.prefixes:
            if name.startswith(prefix):
                return name[len(prefix) :]
        return name


TEXT_PREFIXES: Final = ("language_model.model.", "model.language_model.", "language_model.")
"""Of the part that reads and writes text, in the checkpoint of a model that sees images as well."""
IMAGES: Final = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
"""Its other tensors; a regular expression."""


def text_part(config: Config) -> Config:
    """The configuration of that part; what it leaves open, the whole says."""
    text = config.values.get("text_config")
    if not isinstance(text, dict):
        config.refuse("'text_config' must be an object")
    outer = {name: config.values.get(name) for name in ("dtype", "torch_dtype", "tie_word_embeddings")}
    inner = {name: value for name, value in text.items() if value is not None or name not in outer}
    return Config(outer | inner, f"{config.where}, text_config")


def renamed(spec: TransformerSpec, top: Mapping[str, str], layer: Mapping[str, str], layers: str) -> dict[str, Source]:
    """Sources that differ from the canonical names by a table only.

    top: module → checkpoint module; layer: the same within a layer, with ``experts`` for the list of experts and ``experts.gate`` and so on
    for what each of them has, ``shared.gate`` and so on for what is beside them; layers: name of the list of layers.
    """
    sources = {}
    for name in spec.tensor_shapes():
        module, _, parameter = name.rpartition(".")
        if module.startswith("layers."):
            _, index, part = module.split(".", 2)
            if part.startswith("experts."):
                _, expert, part = part.split(".")
                sources[name] = Source(f"{layers}.{index}.{layer['experts']}.{expert}.{layer[f'experts.{part}']}.{parameter}")
            else:
                sources[name] = Source(f"{layers}.{index}.{layer[part]}.{parameter}")
        else:
            sources[name] = Source(f"{top[module]}.{parameter}")
    return sources


def interleaved(spec: TransformerSpec, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The sources of a checkpoint whose q and k have the order of the original rotary code (see Source)."""
    assert spec.rope is not None
    turned = spec.rope.rotary_dim
    order = {"q": (spec.num_heads, turned), "k": (spec.num_kv_heads, turned)}
    parts = {name: name.split(".")[-2] for name in sources}
    return {name: replace(source, interleaved=order[parts[name]]) if parts[name] in order else source for name, source in sources.items()}
