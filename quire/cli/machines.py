"""What --machine names: a GPU that is known, a file that ``quire bench steps`` wrote, or this machine, measured now."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from quire.config import MODEL_HELP, EngineConfig, add_arguments, parse_bytes, read_config_file, resolve
from quire.errors import ConfigError
from quire.machine import GPUS, Machine

if TYPE_CHECKING:
    from quire.models.spec import TransformerSpec

# Of linears at these multiples of the operations for a byte at which memory and arithmetic take equally long; docs/benchmarks/cpu.md.
_CPU_REACHED = ((0.03, 0.95), (0.3, 0.84), (1.0, 0.67), (2.5, 0.77), (10.0, 0.8))
_ALL_REDUCE_S = 20e-6
"""A guess; nothing was measured."""
_ATTENTION_READS, _ATTENTION_COMPUTES = 0.78, 0.55


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of plan and simulate: the model, the machine, the options of the engine, and where the result goes."""
    add = parser.add_argument
    add("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
        help=f"of a folder config.json will do: {MODEL_HELP}")  # fmt: skip
    add("--machine", metavar="NAME|FILE",
        help=f"where it is to run: {', '.join(GPUS)} (with --device cuda, which is implied), or a file that quire bench steps --json "
        "wrote, which is the most exact (default: this machine's CPU, whose memory and arithmetic are measured in about a second)",
    )  # fmt: skip
    add("--memory", metavar="SIZE", help="of the machine, free for Quire (default: what is free here, or what the GPU has)")
    add("--json", metavar="FILE", help="write the result to FILE; - writes it to standard output instead of the text")
    add("--config", metavar="FILE", help="TOML file with options of the engine")
    add_arguments(parser, EngineConfig)


def stated(args: argparse.Namespace) -> Machine | None:
    """What --machine says; None: this machine, which is still to be measured. Raises ConfigError."""
    name = args.machine
    return None if name is None else GPUS.get(name.lower()) or Machine.load(name)


def configured(args: argparse.Namespace, machine: Machine | None) -> EngineConfig:
    """The options of the engine; the device is the machine's where they name none. Raises ConfigError."""
    given = vars(args) if machine is None else {"device": machine.device, **vars(args)}
    config: EngineConfig = resolve((EngineConfig,), given, read_config_file(args.config))[0]
    device = "cuda" if config.device_kind == "gpu" else "cpu"
    if machine is None and device == "cuda":
        known = ", ".join(GPUS)
        raise ConfigError(f"--device {config.device}: say which GPU with --machine: {known}, or a file that quire bench steps --json wrote")
    if machine is not None and machine.device != device:
        raise ConfigError(f"--machine {args.machine} is for --device {machine.device}, not {config.device}: leave --device out")
    return config


def open_machine(machine: Machine | None, config: EngineConfig, spec: TransformerSpec, memory: str | None) -> Machine:
    """Of what runs a part of the model, where several devices share it. memory: its size, where it was stated. Raises ConfigError."""
    from quire.models.parallel import check as check_parallel

    check_parallel(spec, config.tensor_parallel)
    machine = machine or _this(config, spec)
    weights = config.quantize or config.weight_width(spec.dtype)
    if machine.weights and machine.weights != weights:
        raise ConfigError(
            f"--machine: this file was measured with weights in {machine.weights}, not {weights}: make one with the options that you plan "
            "with"
        )
    if memory is not None:
        machine = replace(machine, memory=parse_bytes(memory))
    if machine.device == "cuda" and machine.memory is None:
        raise ConfigError("how much memory the GPU has is not in the file: add for example --memory 80GiB")
    if config.tensor_parallel == 1:
        return machine
    size, wait = config.tensor_parallel, 2 * spec.num_layers * _ALL_REDUCE_S
    source = f"{machine.source}; {size} of them, two sums a layer among them taken to last {_ALL_REDUCE_S * 1e6:.0f} µs each"
    return replace(machine, step_s=machine.step_s + wait, spread=max(machine.spread, 0.35), source=source)


def by_width(config: EngineConfig, spec: TransformerSpec, stated: Machine | None, machine: Machine) -> dict[str, Machine]:
    """How to quantize, or nothing → the machine, which may compute in another width then. machine: that of ``config``, opened."""
    if stated is None:
        other = None if config.quantize else "int8"
        second = replace(_this(replace(config, quantize=other, group_size=None, cache_dir=None), spec), memory=machine.memory)
        single, quantized = (second, machine) if config.quantize else (machine, second)
        kinds = ("stored", "int8", "int4") if config.quantize == "stored" else ("int8", "int4")
        return {"": single, **dict.fromkeys(kinds, quantized)}
    if not machine.weights:
        return dict.fromkeys(("", "int8", "int4" if config.device_kind == "cpu" else "fp8"), machine)
    return {config.quantize or "": machine}


def _this(config: EngineConfig, spec: TransformerSpec) -> Machine:
    from quire.backends.base import cpu_kernels

    with cpu_kernels():
        from quire.backends.cpu import _native as native
        from quire.backends.cpu.machine import use_threads
    threads = use_threads(config.threads)
    reads = native.measure_read_bandwidth() * 1e9
    single = native.measure_peak("float32") * 1e9
    kind = native.arithmetic("int8" if config.quantize else config.weight_width(spec.dtype))
    peak = single if kind == "float32" else native.measure_peak(kind) * 1e9
    ridge = peak / reads
    return Machine(
        "this machine",
        reads,
        peak,
        tuple((at * ridge, share) for at, share in _CPU_REACHED),
        _ATTENTION_READS * reads,
        _ATTENTION_COMPUTES * single,
        step_s=3e-4,
        source=f"{threads} threads, limits measured now; the shares of them that are reached are those of other CPUs",
        spread=0.3,
    )
