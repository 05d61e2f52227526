"""The recorder's sums against counting position by position."""

from __future__ import annotations

from quire.bench.recorder import Recorder
from quire.core.groups import ONE_GROUP
from quire.core.plan import RowWork, StepPlan, StepResult
from quire.models.spec import ModelCost, TransformerSpec

SPEC = TransformerSpec("Tiny", 50, 8, 2, 2, 1, 4, 16, 64, dtype="bfloat16")


class Nothing:
    spec = SPEC
    num_blocks, num_host_blocks, block_size, max_model_len, groups = 8, 0, 4, 32, ONE_GROUP
    overlaps = False

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult([7])


def test_costs() -> None:
    head = 2 * 50 * 8
    recorder = Recorder(Nothing(), ModelCost(SPEC, 2 * SPEC.matmul_parameters() + head, head, "float16"))
    plan = StepPlan(work=[RowWork(0, 3, 5, [], True), RowWork(1, 10, 1, [], False)])
    assert recorder.execute(plan).tokens == [7], "the result is passed on"
    (step,) = recorder.steps
    cost = step.cost
    assert (step.sequences, step.extent.positions) == (2, 6)
    context = sum(position + 1 for position in (3, 4, 5, 6, 7, 10))
    # By hand: hidden 8, two heads of 4 over one of 4, feed-forward 16. The last layer: q, k and v for all six positions, the rest for one.
    qkv, rest = 8 * (8 + 4 + 4), 8 * 8 + 3 * 8 * 16
    assert cost.linear_flops == 2 * (6 * (qkv + rest) + 6 * qkv + rest) + 2 * 50 * 8
    assert cost.attention_flops == 4 * 2 * 4 * (context + 8)
    assert cost.flops == cost.linear_flops + cost.attention_flops
    weights = 2 * SPEC.matmul_parameters() + head
    assert cost.bytes_read == weights + (8 + 11) * SPEC.kv_bytes_per_token("float16")
    recorder.execute(StepPlan(work=[RowWork(0, 0, 1, [], False)]))
    assert recorder.steps[1].cost.bytes_read == 2 * SPEC.matmul_parameters() + SPEC.kv_bytes_per_token("float16"), (
        "no row of logits, no head"
    )
