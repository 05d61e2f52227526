"""What the front (HTTP, text) and the engine say to each other: plain data, as msgpack where it crosses a process border.

The engine's process is told first what to load, and answers with what it has loaded or with why it could not.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from quire.core.admission import RequestLimits
from quire.core.sequence import Request, Retention
from quire.core.snapshot import Snapshot
from quire.core.stats import EngineStats
from quire.models.spec import TransformerSpec
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams
from quire.structured import Structured


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Tagged with its name, fields in their order."""


class Load(Message, frozen=True):
    """The first message: the fields of the EngineConfig."""

    config: dict[str, Any]
    measure_limits: bool = False
    """Measure what the machine can do."""
    kv_events: str | None = None
    """Say what the cache holds, in this format (kv_events.py)."""
    constrained: bool = False
    """Requests with constraints are in flight: be ready for them from the start."""


class Add(Message, frozen=True):
    """Queue a request. Its front has checked it against the engine's limits."""

    request: Any
    """A Request; its fields, where it came as msgpack. See ``read``."""
    resumed: list[list[int] | None] = []
    """What another engine made of it: the tokens of each sequence, None where it has ended. Empty for a new request."""

    def read(self) -> Request:
        if isinstance(self.request, Request):
            return self.request
        fields = dict(self.request)
        params = {name: value for name, value in fields.pop("params").items() if name != "stop_strings"}
        if (structured := params["structured"]) is not None:
            params["structured"] = Structured(**structured)
        retention = fields.pop("retention")
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return Request(params=SamplingParams(**params), retention=None if retention is None else Retention(**retention), **fields)


class Abort(Message, frozen=True):
    """End a request, or only its ``index``-th sequence. Unknown and finished ones are fine: hang-ups race with ends."""

    request_id: str
    index: int | None = None


class GetStats(Message, frozen=True):
    """Answered with ``Stats`` of the same ticket, after every message sent before it was applied."""

    ticket: int


class GetSnapshot(Message, frozen=True):
    """Answered with ``Seen`` of the same ticket. From the first one on the engine notes copies, evictions and preemptions."""

    ticket: int


class Unwatch(Message, frozen=True):
    """Nobody watches any more: the engine notes nothing."""


class Stop(Message, frozen=True):
    """Leave the loop; nothing more is answered."""


class Loaded(Message, frozen=True):
    """The engine is ready. What its front needs to know."""

    limits: RequestLimits
    eos_token_ids: list[int]
    sampling_defaults: dict[str, Any]
    architecture: str
    num_parameters: int
    dtype: str
    """Of the checkpoint."""
    kv_layers: int
    num_host_blocks: int
    max_num_seqs: int
    policy: str
    """Name of the class that admits."""
    weight_note: str
    memory_note: str
    phases: list[tuple[str, float]]
    """What took how many seconds."""
    spec: TransformerSpec
    weight_bytes: int
    head_bytes: int
    expert_bytes: int
    """All as Backend tells them."""
    machine_limits: tuple[float, float] | None = None
    """Bytes read and operations per second, where they were to be measured."""


class NotLoaded(Message, frozen=True):
    """The engine can't start: a QuireError's own words."""

    message: str
    param: str | None
    kind: str
    """Name of its class in quire.errors."""


class Outputs(Message, frozen=True):
    """All that one step added, for all requests: one message a step, not one a token. A sequence is in one of both lists."""

    outputs: list[SequenceOutput]
    tokens: list[tuple[str, int, int]] = []
    """Request id, index, token of those sequences of which there is nothing else to say: nearly all, at a tenth of the work."""

    @staticmethod
    def of(outputs: list[SequenceOutput]) -> Outputs:
        tokens, others = [], []
        for output in outputs:
            if output.is_one_token:
                tokens.append((output.request_id, output.index, output.token_ids[0]))
            else:
                others.append(output)
        return Outputs(others, tokens)


class Stats(Message, frozen=True):
    """Answers GetStats; also said unasked, with ticket ``UNASKED``, every ``STATS_S`` seconds while there is work, and after it."""

    ticket: int
    stats: EngineStats
    send_s: float = 0.0
    """Seconds since the start that messages to the front took."""


class KVEvents(Message, frozen=True):
    """What was stored in the cache and removed from it in a step, as kv_events.py writes it for subscribers."""

    payload: bytes


class Seen(Message, frozen=True):
    ticket: int
    snapshot: Snapshot
    cost_s: float
    """Seconds of the engine's thread that the snapshot before this one took, with its encoding."""


class Alive(Message, frozen=True):
    """A step has ended that had nothing to say; at most one in ``ALIVE_S`` seconds."""

    steps: int


Death = Literal["crash", "kill", "form"]
"""How an engine ended: by itself; from outside, by SIGKILL; or because a form of structured output could not be followed
(grammar/watch.py)."""


class Down(Message, frozen=True):
    """The engine has died, and another one is being started: what is in flight goes on there. Said on the front's side."""

    reason: str
    death: Death = "crash"


class Up(Message, frozen=True):
    """The other one is ready. Said on the front's side."""


class Stalled(Message, frozen=True):
    """No step has ended for ``seconds``, though there is work. The next message of the engine says that it goes on. Said on the
    front's side."""

    seconds: float


class Died(Message, frozen=True):
    """No engine could be started, several times in a row; every request in flight is lost. Up may come later."""

    reason: str


ToEngine = Add | Abort | GetStats | GetSnapshot | Unwatch | Stop
FromEngine = Outputs | Stats | KVEvents | Seen | Alive | Stalled | Down | Up | Died

ALIVE_S = 0.5
STATS_S = 1.0
UNASKED = -1

encode = msgspec.msgpack.Encoder().encode
_to_engine = msgspec.msgpack.Decoder(Load | ToEngine)
_from_engine = msgspec.msgpack.Decoder(Loaded | NotLoaded | Outputs | Stats | KVEvents | Seen | Alive | Died)


def decode_to_engine(data: bytes) -> Load | ToEngine:
    message: Load | ToEngine = _to_engine.decode(data)
    return message


def decode_from_engine(data: bytes | bytearray) -> Loaded | NotLoaded | Outputs | Stats | KVEvents | Seen | Alive | Died:
    message: Loaded | NotLoaded | Outputs | Stats | KVEvents | Seen | Alive | Died = _from_engine.decode(data)
    return message
