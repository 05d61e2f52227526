"""What stands behind the door once the engine has loaded: the client, the tokenizer, the application."""

from __future__ import annotations

import gc
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quire.config import EngineConfig, ServerConfig
from quire.errors import QuireError
from quire.models.spec import ModelCost
from quire.server.app import create_app
from quire.server.banner import banner, short_count
from quire.server.batches.runner import open_runner
from quire.server.calls.compiler import Compiler
from quire.server.context import Context, ModelFacts
from quire.server.engine.client import EngineClient
from quire.server.engine.supervisor import EngineProcess, Supervisor
from quire.server.http.keys import Keys
from quire.server.launch import since_process_start
from quire.server.loading import Door, Serving
from quire.server.metrics.observers import Observers

if TYPE_CHECKING:
    from quire.server.batches.store import Store
    from quire.server.engine.messages import Loaded


@dataclass(slots=True, frozen=True)
class Start:
    """What is there while the engine loads."""

    engine: EngineProcess
    engine_config: EngineConfig
    server_config: ServerConfig
    folder: Path
    url: str
    phases: list[tuple[str, float]]
    """What took how many seconds; for the banner."""
    door: Door
    ends: ExitStack
    """What is to be closed when the server ends."""
    keys: Keys | None
    store: Store | None
    model: str
    aliases: tuple[str, ...]
    observers: Observers
    kv_events: str | None
    """The format in which they are published."""


def load_model(start: Start) -> Serving:
    """Wait until the engine has loaded. Raises QuireError."""
    from quire.text.tokenizer import Tokenizer

    started = time.perf_counter()
    try:
        tokenizer = Tokenizer.load(start.folder)
    except QuireError:
        start.engine.loaded()  # a folder that is no model at all is reported as that
        raise
    start.phases.append(("tokenizer", time.perf_counter() - started))
    loaded = start.engine.loaded()
    start.phases.extend(loaded.phases)
    config, engine_config = start.server_config, start.engine_config
    client = EngineClient(loaded.limits, engine_config.max_waiting)
    start.observers.attach(client)
    compiler = Compiler(start.folder, loaded.limits.vocab_size, loaded.eos_token_ids)
    start.ends.callback(compiler.close)
    kv_dtype = engine_config.kv_width(loaded.spec.dtype)
    cost = ModelCost(loaded.spec, loaded.weight_bytes, loaded.head_bytes, kv_dtype, loaded.expert_bytes)
    batches = None if start.store is None else open_runner(start.store, client, config)
    app = create_app(Context(
        client, tokenizer, config, start.model, tuple(loaded.eos_token_ids), dict(loaded.sampling_defaults),
        embedding_size=loaded.spec.embedding_size, facts=_facts(loaded, engine_config, start.folder), aliases=start.aliases,
        keys=start.keys, cost=cost, machine_limits=loaded.machine_limits, publisher=start.observers.publisher, compiler=compiler,
        batches=batches,
    ))  # fmt: skip

    def ready() -> None:
        start.door.open(app, client.meter.refuse)
        gc.collect()
        gc.freeze()  # what is there now stays: collecting the garbage of requests need not look at it
        try:
            keys = start.keys is not None
            print(banner(start.url, start.model, loaded, engine_config, start.phases, since_process_start(), keys), flush=True)
        except OSError as e:  # a full disk, a reader that has left: no reason not to serve
            logging.getLogger("quire.server").warning("%s is ready, but standard output can't be written: %s", start.url, e.strerror)

    link = Supervisor(start.engine, engine_config, config.engine_timeout, start.kv_events)
    return Serving(client, link, ready, batches)


def _facts(loaded: Loaded, config: EngineConfig, folder: Path) -> ModelFacts:
    family = loaded.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel").lower()
    count = loaded.num_parameters
    on_gpu = loaded.weight_bytes if config.device_kind == "gpu" else 0
    quantize = config.as_stored(loaded.spec.quantized).quantize
    weights = loaded.spec.widths(quantize) if quantize else config.weight_width(loaded.dtype)
    stored = "gguf" if folder.is_file() else "safetensors"
    return ModelFacts(family, count, short_count(count).replace(" ", ""), weights, stored, loaded.weight_bytes, on_gpu)
