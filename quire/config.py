"""Configuration: frozen dataclasses, composed, resolved once. The fields here are the only source of --help.

Precedence: configuration file < environment (QUIRE_<FIELD>) < command line.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

EMBEDDED_MODEL = "embedded"
"""Name of the small model that ships with the package."""

MODEL_HELP = (
    f"folder in Hugging Face format, GGUF file, or name on the Hugging Face Hub, as org/name or, of GGUF files, org/name:Q4_K_M (default: "
    f"{EMBEDDED_MODEL}, the small model that ships with Quire)"
)

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"block_size": 16, "kv_memory": "2GiB", "max_num_batched_tokens": 512, "speculation": "prompt-lookup"},
    "gpu": {"block_size": 64, "kv_memory": "auto", "max_num_batched_tokens": 2048, "speculation": "off"},
}
"""What options are that nobody stated, where that depends on the device; "gpu": of the CUDA backend, wherever it runs."""
DEFAULT_NUM_SEQS = {"cpu": 64, "gpu": 256}
MAX_NUM_SEQS = 4096
MAX_TIMEOUT_S = 86400

_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


def model_name(path: Path, given: str = "") -> str:
    """What a model is called after its folder, or its GGUF file (of several parts the first); in the Hub's cache, as it was ``given``,
    or else as on the Hub."""
    if given and given != str(path) and "snapshots" in path.parts and any(part.startswith("models--") for part in path.parts):
        return given
    if path.is_file():
        return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name, flags=re.IGNORECASE)
    path = path.resolve()
    if path.parent.name == "snapshots" and (parts := path.parent.parent.name.split("--"))[0] == "models":
        return "/".join(parts[1:])
    return path.name


def parse_bytes(text: str | int) -> int:
    """``"2GiB"``, ``"512MiB"``, ``"1.5GB"`` or a plain number → bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size: write for example 2GiB, 512MiB or a number of bytes")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size >= 1 << 63:
        raise ConfigError(f"{text!r:.60} is more memory than a machine can address")
    return int(size)


def option(default: Any, help: str, *, choices: tuple[Any, ...] | None = None, low: int | None = None, high: int | None = None,
           metavar: str | None = None) -> Any:  # fmt: skip
    """A configuration field: its default, its help text, and what is allowed."""
    meta = {"help": help, "choices": choices, "low": low, "high": high, "metavar": metavar}
    return field(default=default, metadata=meta)


class _Checked:
    """Checks every field against its ``option`` when the object is made."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, meta = getattr(self, f.name), f.metadata
            flag = "--" + f.name.replace("_", "-")
            if value is None:
                continue
            # 16.0 equals 16, and is no number of positions.
            if (choices := meta.get("choices")) and (value not in choices or type(value) is not type(choices[0])):
                raise ConfigError(f"{flag} {value!r} is not supported; choose from: {', '.join(map(str, choices))}", param=f.name)
            kind = str(f.type).partition(" ")[0]
            size = meta.get("metavar") == "SIZE" and type(value) is int  # a number of bytes
            if (kind == "bool" and not isinstance(value, bool)) or (kind == "str" and not (size or isinstance(value, str | os.PathLike))):
                raise ConfigError(f"{flag} must be {'true or false' if kind == 'bool' else 'a text'}, got {value!r:.60}", param=f.name)
            low, high = meta.get("low"), meta.get("high")
            if low is None and high is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{flag} must be an integer, got {value!r}", param=f.name)
            if (low is not None and value < low) or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ConfigError(f"{flag} must be {bounds}, got {value}", param=f.name)


@dataclass(frozen=True, slots=True)
class EngineConfig(_Checked):
    """What an engine needs to know: the model, its memory, and the limits of a step."""

    model: str = field(default=EMBEDDED_MODEL, metadata={})
    device: str = option(
        "cpu",
        "where the model runs: cpu; cuda, an NVIDIA GPU (needs quire[cuda]); torch-cpu, the code of cuda in plain PyTorch on a CPU: slow, "
        "for tests",
        choices=("cpu", "cuda", "torch-cpu"),
    )
    dtype: str = option(
        "auto",
        "width of the weights; auto keeps the checkpoint's. An AMD CPU that multiplies bfloat16 (Zen 4) is up to twice as fast with that "
        "as with float32 or float16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = option(
        None,
        "quantize the linear layers at load: int8; int4 (CPU); fp8 (GPU); --dtype is the width of the rest. stored (CPU; the default for a "
        "checkpoint that is quantized, GGUF or other): those of 4 bits as they are, others int8; none: --dtype for all",
        choices=("int8", "int4", "fp8", "stored", "none"),
    )
    group_size: int | None = option(
        None,
        "with --quantize: inputs of a layer that share a scale; 0, with int8, is one scale for each output (default: int8 0, int4 32)",
        choices=(0, 32, 64, 128),
    )
    cache_dir: str | None = option(
        None, "with --quantize: folder that keeps the packed weights, so that the next start maps them instead", metavar="DIR"
    )
    max_model_len: int | None = option(None, "longest sequence in tokens, prompt and output together (default: the model's context)", low=2)
    block_size: int = option(
        None, "token positions in a block of KV memory (default: 16; on a GPU 64)", choices=(4, 8, 16, 32, 64, 128, 256)
    )
    kv_dtype: str = option(
        "auto",
        "width of the KV cache; int8, and fp8 on a GPU, have a scale for each head's key and value of a token, and take a little more than "
        "half of float16; auto is float16, on a GPU the width of the weights",
        choices=("auto", "float16", "float32", "bfloat16", "int8", "fp8"),
    )
    kv_memory: str = option(
        None,
        "memory for the KV cache, e.g. 2GiB or 512MiB; auto takes what the device can spare, and says how much (default: 2GiB; on a GPU "
        "auto)",
        metavar="SIZE",
    )
    prefix_caching: bool = option(True, "keep what was computed, so that prompts with an equal beginning find it")
    admission: str = option(
        "auto",
        "when a waiting request may start: watermark (its prompt fits), no-evict (everybody's longest output fits), past-future (the "
        "outputs expected from the lengths seen so far fit); auto is past-future on the CPU, where computing a preempted request again "
        "is dear, and watermark on a GPU, where it is cheap",
        choices=("auto", "watermark", "no-evict", "past-future"),
    )
    preemption: str = option(
        "auto",
        "what becomes of a request that has to make room: recompute (what the prefix cache has not kept), swap (to --swap-memory); auto "
        "swaps where there is swap memory",
        choices=("auto", "recompute", "swap"),
    )
    swap_memory: str = option("0", "memory that preempted requests are swapped to, e.g. 1GiB; for each GPU", metavar="SIZE")
    max_waiting: int = option(1024, "most samples that wait to be started; further requests are refused (HTTP 429)", low=1, high=1 << 20)
    max_num_batched_tokens: int = option(
        None,
        "most token positions computed in a step; longer prompts are computed in chunks (default: 512; on a GPU 2048)",
        low=1,
        high=1 << 20,
    )
    max_num_seqs: int | None = option(
        None,
        f"most sequences that run at the same time (default: {DEFAULT_NUM_SEQS['cpu']}, on a GPU {DEFAULT_NUM_SEQS['gpu']}, or as many "
        "as there are KV blocks for: one each, or one of each group of layers)",
        low=1,
        high=MAX_NUM_SEQS,
    )
    speculation: str = option(
        None,
        "guess tokens and verify them in the same step: prompt-lookup goes on as the text did where it stood before, as long as that pays; "
        "outputs are the same with and without (default: prompt-lookup; on a GPU off)",
        choices=("prompt-lookup", "off"),
    )
    speculation_positions: int = option(
        8, "token positions up to which a step is filled up with guesses: about as many as take little longer than one", low=2, high=256
    )
    tensor_parallel: int = option(1, "GPUs that share the model, each with a part of every layer", low=1, high=64)
    deterministic: bool = option(
        False,
        "on a GPU: what a request gets does not depend on the requests beside it (docs/cuda.md says what else may differ); on the CPU that "
        "is always so",
    )
    cuda_graphs: bool = option(True, "on a GPU: capture decode steps, and run them with one launch each")
    threads: int | None = option(None, "threads that compute (default: the cores that this process may use)", low=1, high=256)
    seed: int = option(
        0,
        "seeds the requests that bring no seed of their own (offline API, batch run; in a server they are random)",
        low=0,
        high=(1 << 63) - 1,
    )
    kv_debug: bool = field(
        default=False, metadata={"help": "fill fresh KV blocks with NaN, to find reads of memory that was never written"}
    )

    def __post_init__(self) -> None:
        for name, value in DEFAULTS[self.device_kind].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _Checked.__post_init__(self)  # super() does not find its class where slots made a new one
        self._check_device()
        if self.kv_memory != "auto":
            parse_bytes(self.kv_memory)
        if self.preemption == "swap" and self.swap_bytes == 0:
            raise ConfigError("--preemption swap needs memory to swap to: add for example --swap-memory 1GiB", param="swap_memory")
        if self.preemption == "recompute" and self.swap_bytes > 0:
            raise ConfigError(
                f"--swap-memory {self.swap_memory} is of no use with --preemption recompute: leave one of them out", param="swap_memory"
            )

    def as_stored(self, quantized: str) -> EngineConfig:
        """These options for a checkpoint whose linears are quantized so (see TransformerSpec), or not (""): ``quantize`` is what is done
        then, and None where nothing is. Raises ConfigError for options that are of no use then."""
        quantize = self.quantize
        if quantize == "none":
            quantize = None
        elif quantize == "stored" and not quantized:
            raise ConfigError(
                "--quantize stored keeps weights as a quantized file has them, and this model's are not quantized: choose int8 or int4",
                param="quantize",
            )
        elif quantize == "stored" or (quantize is None and quantized and self.device == "cpu"):
            quantize = quantized
        if quantize is None and self.group_size is not None:
            raise ConfigError(
                f"--group-size {self.group_size} is for quantized weights: add --quantize int8 or int4, or leave it out", param="group_size"
            )
        if quantize == "stored" and self.group_size is not None:
            raise ConfigError(
                f"--group-size {self.group_size} is for weights that are quantized at load, and the model's own groups are kept: add "
                "--quantize int8 or int4, or leave it out",
                param="group_size",
            )
        if quantize is None and self.cache_dir is not None:
            raise ConfigError(
                "--cache-dir keeps quantized weights (others are packed as fast as they can be read): add --quantize int8 or int4, or "
                "leave it out",
                param="cache_dir",
            )
        return replace(self, quantize=quantize)

    def _check_device(self) -> None:
        """Raises ConfigError for what only the other kind of device has."""
        if self.device_kind == "cpu":
            for name in ("quantize", "kv_dtype"):
                if getattr(self, name) == "fp8":
                    flag = "--" + name.replace("_", "-")
                    raise ConfigError(f"{flag} fp8 needs a GPU (--device cuda): take {flag} int8", param=name)
            if self.tensor_parallel > 1:
                raise ConfigError(f"--tensor-parallel {self.tensor_parallel} is for GPUs: add --device cuda", param="tensor_parallel")
            return
        if self.quantize in ("int4", "stored"):
            raise ConfigError(f"--quantize {self.quantize} is not there with --device {self.device}: take int8 or fp8", param="quantize")
        if self.group_size:
            raise ConfigError(
                f"--group-size {self.group_size} is not there with --device {self.device}, where each output has one scale: leave it out",
                param="group_size",
            )
        if self.cache_dir is not None:
            raise ConfigError(f"--cache-dir is of no use with --device {self.device}: leave it out", param="cache_dir")

    def num_seqs(self, num_blocks: int, width: int = 1) -> int:
        """Sequences that may run at the same time in a pool of ``num_blocks`` blocks. width: groups of layers, of each of which a sequence
        takes a block at least."""
        return self.max_num_seqs or max(1, min(DEFAULT_NUM_SEQS[self.device_kind], num_blocks // width))

    def weight_width(self, stored: str) -> str:
        """Of a model's weights that are not quantized, where the checkpoint's are ``stored``: on a GPU, of the activations too."""
        return stored if self.dtype == "auto" else self.dtype

    def kv_width(self, stored: str) -> str:
        """Of the KV cache of such a model."""
        if self.kv_dtype != "auto":
            return self.kv_dtype
        return "float16" if self.device == "cpu" else self.weight_width(stored)

    @property
    def device_kind(self) -> str:
        """``cpu``, or ``gpu`` for the CUDA backend."""
        return "cpu" if self.device == "cpu" else "gpu"

    @property
    def kv_bytes(self) -> int | None:
        """Size of the KV pool; None where the backend is to find it."""
        return None if self.kv_memory == "auto" else parse_bytes(self.kv_memory)

    @property
    def swap_bytes(self) -> int:
        """Size of the swap pool."""
        return parse_bytes(self.swap_memory)


@dataclass(frozen=True, slots=True)
class ServerConfig(_Checked):
    """What the HTTP server needs to know besides the engine."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    served_model_name: str | None = option(
        None,
        "model name in the API, or several with commas between them: answers have the first (default: the folder's name)",
        metavar="NAME[,NAME...]",
    )
    api_keys: str | None = option(
        None, "file of the API keys that are asked for, with their limits (default: none is asked for)", metavar="FILE"
    )
    allowed_origins: str | None = option(
        None, "origins whose pages may use the server from a browser, e.g. https://a.example,http://localhost:3000, or * for all "
        "(default: none but its own)", metavar="ORIGINS",
    )  # fmt: skip
    max_connections: int = option(4096, "most connections at a time; further ones are refused (HTTP 503)", low=1, high=1 << 20)
    tool_parser: str = option(
        "auto",
        "format of the model's calls of tools; auto finds it in the model's chat template, none refuses tools",
        choices=("auto", "hermes", "llama3", "mistral", "harmony", "none"),
    )
    reasoning_parser: str = option(
        "auto",
        "how an answer's reasoning is told from the answer: think (<think>...</think> before it); auto looks for that in the model's chat "
        "template, none leaves it in the text; with calls in harmony, reasoning is what is in the channel analysis",
        choices=("auto", "think", "none"),
    )
    max_body_bytes: int = option(8 << 20, "largest request body", low=1024, metavar="BYTES")
    special_tokens_in_messages: bool = option(
        False, "let text in chat messages that spells out a special token of the model be that token; a message can then end itself and go "
        "on as another role",
    )  # fmt: skip
    max_prompts_per_request: int = option(1024, "most prompts, or inputs of /v1/embeddings, in one request", low=1)
    pooling: str = option(
        "last",
        "what /v1/embeddings makes of a text, unless a request says: the state of its last token, or the mean of all",
        choices=("mean", "last"),
    )
    request_timeout: int = option(
        0, "seconds after which a request ends with an error, whatever it asks for; 0 is no limit", low=0, high=MAX_TIMEOUT_S,
        metavar="SECONDS",
    )  # fmt: skip
    batch_dir: str | None = option(
        None,
        "folder that keeps files and batches (/v1/files, /v1/batches) over restarts; one server at a time may have it (default: none are "
        "kept; for one file without a server see quire batch run)",
        metavar="DIR",
    )
    batch_concurrency: int | None = option(
        None,
        "most lines of batches in flight; live requests come before all of them (default: one for each sequence that may run)",
        low=1, high=4096,
    )  # fmt: skip
    max_file_bytes: int = option(200 << 20, "largest upload to /v1/files", low=1024, metavar="BYTES")
    drain_timeout: int = option(
        30,
        "after SIGTERM: seconds in which what is in flight may end by itself, before it is ended",
        low=0,
        high=MAX_TIMEOUT_S,
        metavar="SECONDS",
    )
    engine_timeout: int = option(
        120,
        "seconds without a finished step, while there is work, after which the engine counts as hung and is started again",
        low=1, high=MAX_TIMEOUT_S, metavar="SECONDS",
    )  # fmt: skip
    vllm_metrics: bool = option(
        True, "give the metrics of /metrics under vLLM's names (vllm:*) too, for routers and dashboards that know those"
    )
    measure_limits: bool = option(
        False,
        "measure at the start how fast this machine reads memory and computes, so that /metrics shows what is used (a second or more)",
    )
    otlp_endpoint: str | None = option(
        None, "send a trace of each request to this OpenTelemetry collector, e.g. http://localhost:4318/v1/traces (needs quire[otel])",
        metavar="URL",
    )  # fmt: skip
    kv_events: str | None = option(
        None,
        "publish over ZeroMQ what the prefix cache holds, in vLLM's format, for routers, e.g. tcp://10.0.0.1:5557 (needs "
        "quire[kv-events]); the events hold the tokens of prompts, and whoever reaches the address reads them",
        metavar="ENDPOINT",
    )
    kv_events_replay: str | None = option(None, "with --kv-events: where past events can be asked for", metavar="ENDPOINT")
    kv_events_topic: str = option("", "with --kv-events: their topic, e.g. kv@10.0.0.1@model", metavar="TEXT")
    kv_events_format: str = option(
        "map", "with --kv-events: how an event is written; array is for subscribers of before 2026", choices=("map", "array")
    )

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        if self.served_model_name is not None and not self.model_names:
            raise ConfigError(f"--served-model-name {self.served_model_name!r} holds no name: leave it out", param="served_model_name")

    @property
    def model_names(self) -> tuple[str, ...]:
        """Of --served-model-name."""
        names = (name.strip() for name in (self.served_model_name or "").split(","))
        return tuple(dict.fromkeys(name for name in names if name))


def add_arguments(parser: argparse.ArgumentParser, *classes: type) -> None:
    """One ``--flag`` for each field of the configuration classes; absent flags are left out of the namespace."""
    for cls in classes:
        for f in fields(cls):
            if "help" not in f.metadata:
                continue
            meta, flag = f.metadata, "--" + f.name.replace("_", "-")
            if f.type == "bool":
                action = argparse.BooleanOptionalAction if f.default else "store_true"  # on by default: --no-... switches it off
                default = " (default: on)" if f.default else ""
                parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=meta["help"] + default)
                continue
            default = "" if f.default is None or f.default is MISSING else f" (default: {f.default})"
            metavar = meta.get("metavar") or (
                "|".join(map(str, meta["choices"])) if meta.get("choices") else ("N" if "int" in str(f.type) else "TEXT")
            )
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=meta["help"].replace("%", "%%") + default)


def _convert(name: str, declared: str, value: Any, source: str) -> Any:
    if not isinstance(value, str):
        return value
    if declared == "bool":
        if value.lower() in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return value.lower() in ("1", "true", "yes", "on")
        raise ConfigError(f"{source} must be true or false, got {value!r}", param=name)
    if "int" in declared:
        try:
            return int(value)
        except ValueError:
            raise ConfigError(f"{source} must be an integer, got {value!r}", param=name) from None
    return value


def read_config_file(path: str | None) -> dict[str, Any]:
    """A TOML file of ``name = value`` lines (dashes or underscores). Raises ConfigError."""
    if path is None:
        return {}
    import tomllib

    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"can't read the configuration file {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # TOML and UTF-8 errors are ValueErrors; so is a number too long for Python
        raise ConfigError(f"the configuration file {path} is not valid TOML: {e}") from None
    return {name.replace("-", "_"): value for name, value in table.items()}


def resolve(classes: tuple[type, ...], arguments: Mapping[str, Any], file: Mapping[str, Any] | None = None,
            environ: Mapping[str, str] | None = None) -> list[Any]:  # fmt: skip
    """Build one object of each class from file < environment < arguments. Raises ConfigError, naming the source."""
    environ = os.environ if environ is None else environ
    file = dict(file or {})
    known = {f.name for cls in classes for f in fields(cls)}
    if unknown := sorted(set(file) - known):
        raise ConfigError(f"unknown option in the configuration file: {unknown[0]}; known: {', '.join(sorted(known))}", param=unknown[0])
    built = []
    for cls in classes:
        values: dict[str, Any] = {}
        for f in fields(cls):
            env = f"QUIRE_{f.name.upper()}"
            for source, label in ((file, f.name), (environ, env), (arguments, "--" + f.name.replace("_", "-"))):
                key = env if source is environ else f.name
                # Kubernetes sets QUIRE_PORT=tcp://... in every pod beside a service named quire; it is not meant for us.
                kubernetes = source is environ and f.name == "port" and environ.get(env, "").startswith("tcp://")
                if key in source and not kubernetes:
                    values[f.name] = _convert(f.name, str(f.type), source[key], label)
        built.append(cls(**values))
    return built
