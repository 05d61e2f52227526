"""Which device the CUDA backend runs on, and whether this machine has it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from quire.config import EngineConfig
from quire.errors import ConfigError

LEAST_CAPABILITY = (8, 0)
"""bfloat16 products and asynchronous copies into shared memory: Ampere."""

FP8_CAPABILITY = (8, 9)
"""Instructions that convert e4m3."""

LEAST_TRITON = (3, 5)
"""Older ones fail to compile some kernels."""


def open_device(name: str, index: int = 0) -> Any:
    """The torch.device of ``--device`` cuda or torch-cpu; index: which GPU.

    Raises ConfigError where there is no GPU, its driver or itself is too old, or PyTorch or Triton is missing.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise _missing(name, "PyTorch is") from None
    except (ImportError, OSError) as e:  # a build whose libraries are not all there
        raise ConfigError(f"--device {name}: PyTorch can't be loaded: {_first_line(e)}", param="device") from None
    if name == "torch-cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise ConfigError(
            f"--device cuda: this PyTorch ({torch.__version__}) was built without CUDA: install one that was, or use --device cpu",
            param="device",
        )
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as e:  # no driver, one that is too old, no GPU: PyTorch says which, with versions
        raise ConfigError(f"--device cuda: {_first_line(e)}", param="device") from None
    if index >= count:
        raise ConfigError(f"--device cuda: {index + 1} GPUs are asked for, this machine shows {count}", param="device")
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        raise ConfigError(
            f"--device cuda: {torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (Ampere) is the least that the kernels run on: use --device cpu",
            param="device",
        )
    _check_triton(name)
    torch.cuda.set_device(index)
    _check_compiler()
    return torch.device("cuda", index)


def check_fp8(config: EngineConfig, index: int) -> None:
    """Raises ConfigError where GPU ``index`` is to convert numbers that it has no instructions for."""
    import torch

    capability = torch.cuda.get_device_capability(index)
    for option, value in (("kv_dtype", config.kv_dtype), ("quantize", config.quantize)):
        if value == "fp8" and capability < FP8_CAPABILITY:
            raise ConfigError(
                f"--{option.replace('_', '-')} fp8: {torch.cuda.get_device_name(index)} has compute capability "
                f"{capability[0]}.{capability[1]}; {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} (Ada) is the least: take int8",
                param=option,
            )


def operations(device: Any) -> Any:
    """What the decoder calls: the kernels on a GPU, their PyTorch counterparts elsewhere. Same names, same signatures."""
    if device.type == "cuda":
        from quire.backends.cuda.kernels import operations as kernels

        return kernels
    from quire.backends.cuda.reference import operations as reference

    return reference


def _check_triton(name: str) -> None:
    if find_spec("triton") is None:
        raise _missing(name, "Triton is")
    import triton

    version: str = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        raise ConfigError(
            f"--device {name}: Triton {version} is too old: {least} is the least that compiles the kernels: pip install 'triton>={least}' "
            "with the PyTorch that goes with it (2.9 or newer), or use --device cpu",
            param="device",
        )


def _check_compiler() -> None:
    """Triton compiles what it talks to the driver with, at first use."""
    from triton.runtime import driver

    try:
        _ = driver.active.utils
    except Exception as e:  # a RuntimeError without a compiler, a CalledProcessError without headers
        raise ConfigError(
            f"--device cuda: Triton can't compile what it needs ({_first_line(e)}): install a C compiler and the headers of Python "
            "(Debian: apt-get install gcc python3-dev), or name the compiler in CC",
            param="device",
        ) from None


def _missing(name: str, what: str) -> ConfigError:
    return ConfigError(f"--device {name}: {what} not installed: pip install 'quire[cuda]', or use --device cpu", param="device")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
