"""The offline API as a script uses it, on the embedded model."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.backends.cpu import memory
from quire.config import EngineConfig, parse_bytes
from quire.core.sequence import Request
from quire.errors import CapacityError, ConfigError, ContextLengthError, InvalidRequestError, ModelLoadError

PROMPTS = ["def fibonacci(n):", "import os\n", "class Stack:\n    def push(self, item):"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", block_size=16, kv_dtype="float16", kv_memory="64MiB", max_num_batched_tokens=512, max_num_seqs=64, seed=0)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (12, 3, 7)]
    outputs = llm.generate(PROMPTS, params)
    assert [o.prompt for o in outputs] == PROMPTS
    assert [len(o.outputs[0].token_ids) for o in outputs] == [12, 3, 7]
    for output in outputs:
        choice = output.outputs[0]
        assert choice.finish_reason == "length"
        assert choice.text == llm.tokenizer.decode(choice.token_ids)
        assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt or "")
        assert output.usage.total_tokens == len(output.prompt_token_ids) + len(choice.token_ids)


def test_text_and_token_prompts_are_the_same(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    by_text = llm.generate(PROMPTS[0], params)[0]
    by_ids = llm.generate({"prompt_token_ids": by_text.prompt_token_ids}, params)[0]
    assert by_ids.outputs == by_text.outputs
    assert by_ids.prompt is None


def test_samples_differ_and_repeat_with_their_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=12)
    first, second = llm.generate(PROMPTS[0], params)[0], llm.generate(PROMPTS[0], params)[0]
    assert [c.index for c in first.outputs] == [0, 1, 2, 3]
    assert first.outputs == second.outputs
    assert len({tuple(c.token_ids) for c in first.outputs}) > 1


def test_requests_without_seed_follow_the_seed_of_the_llm() -> None:
    def sample(seed: int) -> list[list[int]]:
        llm = LLM(seed=seed, kv_memory="16MiB")
        return [o.outputs[0].token_ids for o in llm.generate([PROMPTS[0]] * 3, SamplingParams(max_tokens=10, ignore_eos=True))]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert len({tuple(tokens) for tokens in sample(1)}) > 1


def test_without_parameters_the_model_has_its_own() -> None:
    def tokens(params: SamplingParams | None) -> list[int]:
        return LLM(kv_memory="16MiB").generate(PROMPTS[0], params)[0].outputs[0].token_ids

    own = LLM(kv_memory="16MiB").get_default_sampling_params()
    assert own == SamplingParams(temperature=0.7, top_p=0.9)
    assert tokens(None) == tokens(own) != tokens(SamplingParams())


def test_logprobs(llm: LLM) -> None:
    choice = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=5, logprobs=3))[0].outputs[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs) == len(choice.token_ids)
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert next(iter(entry)) == token
        assert entry[token].rank == 1
        assert 3 <= len(entry) <= 4
        assert entry[token].logprob == max(e.logprob for e in entry.values()) <= 0
        assert entry[token].decoded_token == llm.tokenizer.token_text(token)


def test_stop_strings_end_a_sample_and_free_it(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0].outputs[0].text
    stop = whole[10:13]
    cut = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop))[0].outputs[0]
    assert cut.text == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert llm.engine.stats().kv.used_blocks == 0
    with_stop = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert llm.generate(PROMPTS[0], with_stop)[0].outputs[0].text == whole[: whole.index(stop)] + stop


def test_stream_gives_the_same_text_and_can_be_left(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    assert "".join(llm.stream(PROMPTS[0], params)) == llm.generate(PROMPTS[0], params)[0].outputs[0].text
    stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
    next(stream)
    assert llm.engine.stats().kv.used_blocks > 0
    stream.close()
    assert llm.engine.stats().kv.used_blocks == 0


def test_streams_and_generate_share_the_engine(llm: LLM) -> None:
    """Whoever asks for a step, each stream gets its own text and all of it."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    alone = ["".join(llm.stream(prompt, params)) for prompt in PROMPTS]
    streams = [llm.stream(prompt, params) for prompt in PROMPTS]
    texts = [next(stream) for stream in streams]
    texts = [text + next(stream) for text, stream in zip(texts, streams, strict=True)]
    assert [o.outputs[0].text for o in llm.generate(PROMPTS, params)] == alone
    assert [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)] == alone
    assert not llm.engine.has_work


def test_bad_requests_change_nothing(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match=r"prompt \d+ \+ max_tokens 4,000 > context 2,048: lower max_tokens to at most 2,"):
        llm.generate([PROMPTS[0], PROMPTS[1]], SamplingParams(max_tokens=4000))
    with pytest.raises(ContextLengthError, match="2,048"):
        llm.generate({"prompt_token_ids": [5] * 2048})
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate("")
    with pytest.raises(InvalidRequestError, match="0 to 4095"):
        llm.generate({"prompt_token_ids": [4096]})
    for ids in (5, [1.0], None):
        with pytest.raises(InvalidRequestError, match="must be a list of integers"):
            llm.generate({"prompt_token_ids": ids})  # type: ignore[typeddict-item]
    with pytest.raises(InvalidRequestError, match="3 prompts but 2"):
        llm.generate(PROMPTS, [SamplingParams()] * 2)
    with pytest.raises(InvalidRequestError, match="a prompt is"):
        llm.generate([5])  # type: ignore[list-item]
    assert not llm.engine.has_work
    assert llm.generate([]) == []


def test_bad_options_are_refused() -> None:
    with pytest.raises(TypeError, match="no parameter 'gpu_memory_utilization'"):
        LLM(gpu_memory_utilization=0.9)
    with pytest.raises(ConfigError, match="block-size 12"):
        LLM(block_size=12)
    with pytest.raises(ConfigError, match="4,096 > the model's context of 2,048"):
        LLM(max_model_len=4096)
    with pytest.raises(CapacityError, match=r"holds 320 token positions .* may need 2,048: raise --kv-memory to at least \d+MiB, or lower"):
        LLM(kv_memory=str(320 * 3072))
    with pytest.raises(CapacityError, match="need more than"):
        LLM(kv_memory="900GiB")
    with pytest.raises(ModelLoadError):
        LLM("no/such/folder")


def test_the_remedy_in_a_message_works() -> None:
    with pytest.raises(CapacityError) as caught:
        LLM(kv_memory="1MiB")
    assert "at least 6MiB" in caught.value.message
    assert LLM(kv_memory="6MiB").generate("x", SamplingParams(max_tokens=2))


def test_the_remedy_for_a_machine_with_too_little_memory_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the memory left by the weights does not hold the model's whole context, and where it holds nothing."""

    def remedy(free: int, **options: Any) -> str:
        monkeypatch.setattr(memory, "available_bytes", lambda: free)
        with pytest.raises(CapacityError, match="need more than") as caught:
            LLM(**options)
        return caught.value.message.rpartition(": ")[2]

    spec = LLM(kv_memory="6MiB").backend.spec
    weights = spec.weight_bytes()
    assert remedy(weights + (9 << 20) + 5) == "lower --kv-memory to at most 9MiB"
    assert LLM(kv_memory="9MiB")
    assert remedy(weights + (3 << 20)) == "lower --kv-memory to at most 3MiB, and --max-model-len to at most 1,024"
    assert LLM(kv_memory="3MiB", max_model_len=1024)
    for free in (weights, weights // 2):
        assert remedy(free) == "free some, or take a smaller model"


def test_a_size_in_a_message_can_be_given_back() -> None:
    big = replace(LLM(kv_memory="6MiB").backend.spec, num_layers=4096, num_kv_heads=64)
    with pytest.raises(CapacityError) as caught:
        memory.kv_memory(EngineConfig(), big, big.max_positions)
    found = re.search(r"at least (\S+),", caught.value.message)
    assert found is not None
    assert parse_bytes(found[1]) > 1 << 34


def test_a_request_whose_stop_tokens_leave_nothing_to_choose() -> None:
    llm = LLM(kv_memory="16MiB")
    every = tuple(range(llm.backend.spec.vocab_size))
    request = Request("a", [5], SamplingParams(min_tokens=1), 0, every)
    llm.engine.add(request)
    (output,) = llm.engine.step()
    assert output.finish_reason == "error"
    assert "before min_tokens every token is banned" in str(output.stop_reason)


def test_a_pool_a_quarter_of_what_is_asked_for_finishes_everything(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=60, ignore_eos=True)
    prompts = [f"def function_{i}(argument):" for i in range(24)]
    small = LLM(kv_memory="1MiB", max_model_len=256)
    assert [o.outputs for o in small.generate(prompts, params)] == [o.outputs for o in llm.generate(prompts, params)]
    assert small.engine.stats().preemptions > 0
