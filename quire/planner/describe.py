"""Plans as text: each number with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quire.config import MAX_NUM_SEQS, EngineConfig
from quire.machine import Machine
from quire.models.spec import DTYPE_BYTES, KV_SCALE_BYTES, TransformerSpec
from quire.planner.plan import Demand, Plan


def describe(p: Plan, config: EngineConfig, spec: TransformerSpec, machine: Machine, demand: Demand, price: float | None) -> str:
    """spec: of what one device has. price: of an hour, in any currency."""
    return "\n".join(_lines(p, config, spec, machine, demand, price))


def table(named: Sequence[tuple[str, Plan]], first: str) -> str:
    """One line for each plan. first: what the names are."""
    width = max(len(first), *(len(name) for name, _ in named))
    lines = [
        f"{first:<{width}} {'weights':>10} {'KV a token':>11} {'KV pool':>10} {'tokens':>12} {'sequences':>10} {'1 alone':>9} {'all':>10}"
    ]
    for name, p in named:
        size = f"{name:<{width}} {gb(p.weights):>10} {kb(p.kv_per_token):>11} "
        if not p.num_blocks:
            lines.append(size + "does not fit")
            continue
        one, all_ = p.speeds[0], max(p.speeds, key=lambda speed: speed.all_per_s)
        less = "" if p.misfit is None else f"   --max-model-len {p.max_model_len} at most"
        numbers = f"{gb(p.pool):>10} {p.pool_tokens:>12,} {p.typical:>10,} {one.each_per_s:>9,.1f} {all_.all_per_s:>10,.0f}"
        lines.append(size + numbers + less)
    return "\n".join(lines)


def _lines(p: Plan, config: EngineConfig, spec: TransformerSpec, machine: Machine, demand: Demand, price: float | None) -> Iterator[str]:
    width, kv = config.weight_width(spec.dtype), config.kv_width(spec.dtype)
    share = f", of which each of {config.tensor_parallel} devices has a part" if config.tensor_parallel > 1 else ""
    beside = " and a shared feed-forward" if spec.shared_size else ""
    where = f" in {spec.expert_layers} of {spec.num_layers} layers" if spec.dense_sizes else ""
    experts = f" ({spec.experts_per_token} of {spec.num_experts} experts{beside} for a token{where})" if spec.num_experts else ""
    size = f"{p.parameters / 1e6:,.0f} million parameters{experts}"
    yield f"model        {spec.architecture}, {size}, context of {spec.max_positions:,} tokens{share}"
    yield f"machine      {machine.name}, {gb(p.available)} free: {machine.source}"
    yield f"weights      {gb(p.weights)}: " + (
        f"{spec.widths(config.quantize)}, and {width} for what is no linear"
        if config.quantize
        else f"{p.weights // DTYPE_BYTES[width]:,} x {DTYPE_BYTES[width]} bytes"
    )
    vector = f"{spec.head_dim} x {DTYPE_BYTES[kv]} bytes" + (f" + {KV_SCALE_BYTES[kv]} for its scale" if kv in KV_SCALE_BYTES else "")
    count = f"2 (key, value) x {spec.num_layers} layers x {spec.num_kv_heads} heads"
    yield f"KV           {kb(p.kv_per_token)} a token: {count} x ({vector}), {kv}"
    if p.misfit is not None:
        yield f"does not fit {p.misfit}"
        if p.num_blocks:
            yield f"             with --max-model-len {p.max_model_len}:"
    if p.num_blocks:
        yield from _memory(p, spec)
    if p.needed is not None:
        rows = f" --max-num-seqs {demand.sequences}" if (demand.sequences or 0) <= MAX_NUM_SEQS else ", by several servers"
        yield (
            f"needed       {gb(p.needed)} of KV for {demand.sequences:,} sequences of {p.prompt:,} + {p.output:,} tokens, all at their "
            f"ends: --kv-memory {-(-p.needed >> 20)}MiB --max-model-len {p.prompt + p.output}{rows}"
        )
    if p.num_blocks:
        yield from _speeds(p, machine)
        yield from _capacity(p, machine, demand, price)


def _memory(p: Plan, spec: TransformerSpec) -> Iterator[str]:
    blocks, tokens = f"{p.num_blocks:,} blocks of {p.block_size} tokens", f"{p.pool_tokens:,} tokens"
    if p.layers < spec.num_layers:
        layers = "1 layer" if p.layers == 1 else f"{p.layers} layers"
        blocks, tokens = f"{blocks} of {layers}", f"{tokens} of one sequence (of which layers with a window keep what it holds)"
    yield f"KV pool      {gb(p.pool)} = {blocks} = {tokens}"
    if p.note:
        yield f"             {p.note}"
    yield (
        f"fits         {p.full_length:,} sequences of {p.max_model_len:,} tokens (--max-model-len); {p.typical:,} of the demand, which "
        f"have {p.blocks_each:.1f} blocks each on average; at most {p.max_num_seqs:,} (--max-num-seqs)"
    )


def _speeds(p: Plan, machine: Machine) -> Iterator[str]:
    yield f"speed        times to about {machine.spread:.0%}"
    yield f"{'sequences':>14} {'tokens each':>12} {'step, ms':>10} {'tokens/s each':>14} {'tokens/s':>10}"
    for s in p.speeds:
        yield f"{s.sequences:>14,} {s.context:>12,} {1000 * s.step_s:>10,.2f} {s.each_per_s:>14,.1f} {s.all_per_s:>10,.0f}"
    yield f"{'prompt tokens':>14} {'alone, s':>12} {'tokens/s':>10}"
    for prompt in p.prompts:
        yield f"{prompt.tokens:>14,} {prompt.seconds:>12,.3f} {prompt.tokens / prompt.seconds:>10,.0f}"


def _capacity(p: Plan, machine: Machine, demand: Demand, price: float | None) -> Iterator[str]:
    rate, factor = p.requests_per_s, 1 + machine.spread
    at_once = min(p.typical, demand.sequences or p.typical)
    each = f"{p.prompt:,} + {p.output:,} tokens, {at_once:,} at a time"
    yield f"capacity     {rate:,.3g} requests a second ({rate / factor:,.3g} to {rate * factor:,.3g}) of {each}:"
    yield f"             {rate * p.output:,.0f} output tokens/s; first token {p.first_token_s:,.2f} s after a request begins"
    if price is not None:
        cost = price * 1e6 / (3600 * rate * p.output)
        yield f"cost         {cost:,.3g} for a million output tokens, prompts included, at {price:g} an hour, always full"
    if demand.sequences is not None and demand.sequences > p.typical:
        yield f"             not all {demand.sequences:,} sequences run at once: the others wait"
    yield "             how long requests wait at a rate: quire simulate"


def gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def kb(size: float) -> str:
    return f"{size / 1e3:,.1f} kB"
