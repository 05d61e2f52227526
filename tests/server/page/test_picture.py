"""What watchers are sent: changes, applied one after the other, give what the whole picture says."""

from __future__ import annotations

import random

import msgspec
import pytest

from core.fake_backend import FakeBackend
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.core.snapshot import Snapshot, Watch
from quire.sampling_params import SamplingParams
from quire.server.engine.messages import Seen, decode_from_engine, encode
from quire.server.page.picture import Picture, change, whole
from quire.server.page.view import View


def look(watch: Watch) -> Snapshot:
    """As it arrives at the other end of the socket."""
    seen = decode_from_engine(encode(Seen(1, watch.snapshot(), 0.0)))
    assert isinstance(seen, Seen)
    return seen.snapshot


def apply(view: View, made: object) -> None:
    view.apply(msgspec.json.decode(msgspec.json.encode(made)))


@pytest.mark.parametrize("seed", range(4))
def test_changes_add_up_to_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    clock = iter(range(1_000_000))
    config = EngineConfig(max_num_seqs=6, max_num_batched_tokens=32, max_waiting=100, admission="watermark")
    engine = Engine(FakeBackend(24, 4, 64, 50), config, lambda: float(next(clock)))
    watch, follower = engine.watch(), View()
    before: Picture | None = None
    changes = 0
    for number in range(1, 200):
        if rng.random() < 0.3:
            beams = rng.random() < 0.2
            params = SamplingParams(
                n=rng.choice((1, 1, 3)), max_tokens=rng.randint(1, 20), temperature=0 if beams else 1, use_beam_search=beams
            )
            engine.add(Request(str(number), [rng.randrange(3) for _ in range(rng.randint(1, 30))], params, number))
        if rng.random() < 0.05:
            engine.abort(str(rng.randint(1, number)))
        if rng.random() < 0.02:
            engine.reset_prefix_cache()
        engine.step()
        picture = Picture(number, 0, {"kv": {}, "engine": {}}, look(watch))
        made = None if before is None else change(before, picture)
        changes += made is not None
        apply(follower, made or whole(picture))
        truth = View()
        apply(truth, whole(picture))
        assert (follower.states, follower.since, follower.owners) == (truth.states, truth.since, truth.owners)
        assert [s["blocks"] for s in follower.sequences] == [s["blocks"] for s in truth.sequences]
        counts = engine.scheduler.manager.pool.ref_counts
        assert follower.owners == {block: owners for block, owners in enumerate(counts) if owners}
        assert sum(follower.kind(block) == "shared" for block in range(24)) == engine.stats().kv.shared_blocks
        before = picture
    assert changes == 198


def test_a_change_is_small_and_there_is_none_where_it_would_not_do() -> None:
    engine = Engine(FakeBackend(4096, 4, 4096, 50), EngineConfig(max_num_seqs=4, speculation="off"))
    watch = engine.watch()
    engine.add(Request("a", list(range(50)) * 10, SamplingParams(max_tokens=50), 0))
    for _ in range(4):
        engine.step()
    one = Picture(1, 0, {"kv": {}}, look(watch))
    engine.step()
    two = Picture(2, 0, {"kv": {}}, look(watch))
    made = change(one, two)
    assert made is not None
    assert len(msgspec.json.encode(made)) < 600 < 2000 < len(msgspec.json.encode(whole(two)))
    assert change(one, Picture(3, 0, {}, two.snapshot)) is None, "a picture was missed"
    assert change(one, Picture(2, 1, {}, two.snapshot)) is None, "another engine"
    assert change(one, Picture(2, 0, {}, None)) is None, "no engine"
