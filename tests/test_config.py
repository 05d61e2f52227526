"""Configuration: one source for --help, precedence, and errors that name the option."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from quire.config import EngineConfig, ServerConfig, add_arguments, parse_bytes, read_config_file, resolve
from quire.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "number"),
    [("2GiB", 2 << 30), ("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("1000", 1000), (4096, 4096), ("3 kib", 3072), ("1g", 10**9)],
)
def test_sizes(text: str | int, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1", "1e9", "nan", "2 GiB extra"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 20, "9" * 400, "8388608TiB"])
def test_sizes_beyond_any_machine(text: str) -> None:
    with pytest.raises(ConfigError, match="more memory than a machine can address"):
        parse_bytes(text)


def test_the_most_threads_are_those_of_the_kernels() -> None:
    from quire.backends.cpu import _native as native

    (most,) = (f.metadata["high"] for f in fields(EngineConfig) if f.name == "threads")
    before = native.num_threads()
    try:
        native.set_num_threads(most)
        with pytest.raises(ValueError, match=f"1 to {most}"):
            native.set_num_threads(most + 1)
    finally:
        native.set_num_threads(before)


def test_file_is_overridden_by_environment_and_that_by_the_command_line() -> None:
    def block_size(file: dict[str, Any], environ: dict[str, str], arguments: dict[str, Any]) -> int:
        (config,) = resolve((EngineConfig,), arguments, file, environ)
        size: int = config.block_size
        return size

    assert block_size({}, {}, {}) == 16
    assert block_size({"block_size": 32}, {}, {}) == 32
    assert block_size({"block_size": 32}, {"QUIRE_BLOCK_SIZE": "64"}, {}) == 64
    assert block_size({"block_size": 32}, {"QUIRE_BLOCK_SIZE": "64"}, {"block_size": "128"}) == 128


def test_the_port_that_kubernetes_announces_is_not_ours() -> None:
    (server,) = resolve((ServerConfig,), {}, {}, {"QUIRE_PORT": "tcp://10.0.0.1:8000"})
    assert server.port == 8000


def test_every_field_is_a_flag_and_arrives_in_the_right_object() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig, ServerConfig)
    args = vars(parser.parse_args(["--max-num-seqs", "3", "--port", "0", "--kv-debug"]))
    engine, server = resolve((EngineConfig, ServerConfig), args, {}, {})
    assert (engine.max_num_seqs, engine.kv_debug, server.port) == (3, True, 0)
    for flag in ("--block-size", "--kv-memory", "--max-model-len", "--host", "--threads"):
        assert flag in parser.format_help()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"block_size": "12"}, "choose from: 4, 8, 16"),
        ({"block_size": "x"}, "must be an integer, got 'x'"),
        ({"kv_dtype": "int3"}, "choose from: auto, float16, float32, bfloat16, int8, fp8"),
        ({"max_num_seqs": "0"}, "from 1 to 4096, got 0"),
        ({"kv_memory": "lots"}, "not a size"),
        ({"threads": "0"}, "from 1 to 256, got 0"),
        ({"block_size": 16.0}, "block-size 16.0 is not supported"),
        ({"max_model_len": "1"}, "at least 2, got 1"),
        ({"device": "tpu"}, "choose from: cpu"),
    ],
)
def test_wrong_values_are_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve((EngineConfig,), arguments, {}, {})


def test_configuration_files(tmp_path: Path) -> None:
    path = tmp_path / "quire.toml"
    path.write_text("block-size = 32\nkv_memory = '64MiB'\n")
    (config,) = resolve((EngineConfig,), {}, read_config_file(str(path)), {})
    assert (config.block_size, config.kv_bytes) == (32, 64 << 20)
    path.write_text("blok_size = 32\n")
    with pytest.raises(ConfigError, match=r"unknown option .* blok_size"):
        resolve((EngineConfig, ServerConfig), {}, read_config_file(str(path)), {})
    for wrong in ("block_size = = 1\n", "seed = " + "9" * 5000, "model = " + "[" * 100_000):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="not valid TOML"):
            read_config_file(str(path))
    with pytest.raises(ConfigError, match="can't read"):
        read_config_file(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("served_model_name", ["a", "b"], "a text"),
        ("batch_dir", 5, "a text"),
        ("vllm_metrics", 5, "true or false"),
        ("host", {"a": 1}, "a text"),
    ],
)
def test_options_of_another_type(name: str, value: Any, wanted: str) -> None:
    """In a file of options, or from Python: anything is true for Python, so "no" would be."""
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be {wanted}, got"):
        resolve((ServerConfig,), {}, {name: value}, {})
    for wrong in ("no", 1, []):
        with pytest.raises(ConfigError, match="--prefix-caching must be true or false"):
            EngineConfig(prefix_caching=wrong)  # type: ignore[arg-type]


def test_sizes_may_be_numbers_of_bytes() -> None:
    (config,) = resolve((EngineConfig,), {}, {"kv_memory": 64 << 20, "swap_memory": 0}, {})
    assert (config.kv_bytes, config.swap_bytes) == (64 << 20, 0)
    with pytest.raises(ConfigError, match="--kv-memory must be a text, got True"):
        EngineConfig(kv_memory=True)  # type: ignore[arg-type]
