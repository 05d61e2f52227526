"""The offline API as a script uses it, on the embedded model."""

from __future__ import annotations

import gc
import json
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quire import LLM, SamplingParams, Structured
from quire.backends import memory
from quire.config import EngineConfig, parse_bytes
from quire.core.sequence import Request, Retention
from quire.errors import CapacityError, ConfigError, ContextLengthError, EngineError, InvalidRequestError, ModelLoadError
from quire.outputs import Choice, SequenceOutput, TokenLogprobs
from quire.text.chat import Message
from quire.text.output import OutputAssembler, best_choices
from server.scripted import chat_tokenizer

PROMPTS = ["def fibonacci(n):", "import os\n", "class Stack:\n    def push(self, item):"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", block_size=16, kv_dtype="float16", kv_memory="64MiB", max_num_batched_tokens=512, max_num_seqs=64, seed=0)


def test_memory_is_free_once_nobody_holds_it() -> None:
    """At once, not at the next collection of garbage: the next model may need the room."""
    gc.disable()
    try:
        llm = LLM("embedded", kv_memory="16MiB")
        llm.generate("a", SamplingParams(max_tokens=2))
        backend = weakref.ref(llm.backend)
        del llm
        assert backend() is None
    finally:
        gc.enable()


def test_threads_take_turns(llm: LLM) -> None:
    """Each gets what it would have got alone: nothing of one is lost to another, streams included."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    alone = [llm.generate(prompt, params)[0].outputs[0].text for prompt in PROMPTS]

    def one(number: int) -> str:
        prompt = PROMPTS[number % 3]
        return "".join(llm.stream(prompt, params)) if number % 2 else llm.generate(prompt, params)[0].outputs[0].text

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(one, range(18))) == alone * 6
    assert not llm.engine.has_work


def test_wrong_kinds_of_parameters(llm: LLM) -> None:
    for wrong in ({"max_tokens": 3}, [None], [{"max_tokens": 3}], "x", 5):
        with pytest.raises(InvalidRequestError, match="must be a SamplingParams"):
            llm.generate("a", wrong)  # type: ignore[arg-type]
    for params in (SamplingParams(n=2), SamplingParams(best_of=2)):
        with pytest.raises(InvalidRequestError, match="a stream gives one sample"):
            llm.stream_chat([{"role": "user", "content": "a"}], params)
    with pytest.raises(InvalidRequestError):
        llm.stream("a", SamplingParams(structured=Structured.regex("(")))


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


def test_prompts_may_be_written_as_vllm_has_them(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0)
    plain, named = (llm.generate(prompt, params)[0] for prompt in ("def add(a", {"prompt": "def add(a"}))
    assert (named.prompt, named.outputs[0].text) == (plain.prompt, plain.outputs[0].text)
    wrong: list[Any] = [np.array(["a", "b"]), [np.array([1, 2])], None, {"prompt": None}, [{}]]
    for prompt in wrong:
        with pytest.raises(InvalidRequestError, match="a prompt is a string or"):
            llm.generate(prompt, params)


def test_a_stream_of_channels_is_what_is_in_them(llm: LLM) -> None:
    made = copy(llm)
    made.tokenizer = chat_tokenizer("harmony")
    prompt, params = made._chat_prompt([{"role": "user", "content": "Hi"}])["prompt_token_ids"], SamplingParams()
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.\n<|return|>"
    shown, parser = made._channels(prompt, params)
    assert parser is not None
    assembler = OutputAssembler(made.tokenizer, params, (), shown, parser)
    ids = made.tokenizer.encode(said, add_special_tokens=False)
    deltas = [assembler.feed(SequenceOutput("", 0, [token], None, None, None)) for token in ids]
    assert "".join(delta.message.text for delta in deltas if delta.message is not None) == "Hm.\n\nYes."
    for other in (SamplingParams(skip_special_tokens=False), SamplingParams(structured=Structured.json({}))):
        assert made._channels(prompt, other) == (frozenset(), None)
    assert llm._channels(prompt, params) == (frozenset(), None)


def test_chat(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0)
    talks: list[list[Message]] = [[{"role": "user", "content": text}] for text in ("What is a list?", "Sort it.")]
    both = llm.chat(talks, params)
    assert [llm.chat(talk, params)[0].outputs[0].text for talk in talks] == [output.outputs[0].text for output in both]
    assert "".join(llm.stream_chat(talks[0], params)) == both[0].outputs[0].text
    begun: list[Message] = [*talks[0], {"role": "assistant", "content": both[0].outputs[0].text[:5]}]
    more = llm.chat(begun, params, add_generation_prompt=False, continue_final_message=True)[0]
    assert llm.tokenizer.decode(more.prompt_token_ids).endswith(both[0].outputs[0].text[:5])
    for messages, options in (
        ([], {}), ("Hello", {}), (5, {}), ([5], {}), ([talks[0], 5], {}), ([[]], {}), (talks[0], {"chat_template_kwargs": 5}),
        (talks[0], {"continue_final_message": True}), (talks[0], {"retention": {}}),
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError):
            llm.chat(messages, params, **options)  # type: ignore[arg-type]


def test_embeddings(llm: LLM) -> None:
    vectors = [np.array(output.outputs.embedding) for output in llm.embed(["def add(a, b):", "import os"])]
    assert [len(vector) for vector in vectors] == [llm.backend.spec.embedding_size] * 2
    assert np.allclose([vector @ vector for vector in vectors], 1, atol=1e-6)
    assert llm.embed("import os")[0].outputs.embedding == vectors[1].tolist(), "whatever runs beside it"
    assert llm.embed("import os", pooling="mean")[0].outputs.embedding != vectors[1].tolist()
    with pytest.raises(InvalidRequestError, match="mean or last"):
        llm.embed("import os", pooling="cls")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="2,048"):
        llm.embed("a" * 9_000)


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
        memory.kv_memory(EngineConfig(), big, big.max_positions, memory.host_room(EngineConfig(), big))
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


@pytest.mark.parametrize("options", [{}, {"admission": "watermark"}, {"admission": "watermark", "swap_memory": "16MiB"}], ids=str)
def test_a_pool_a_quarter_of_what_is_asked_for_finishes_everything(llm: LLM, options: dict[str, Any]) -> None:
    """64 requests at once, each of which fits alone; the bytes are those of a pool that holds them all."""
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=60, ignore_eos=True)
    prompts = [f"def function_{i}(argument):" for i in range(64)]
    need = 64 * -(-(60 + 10) // 16) * 16 * 3072
    small = LLM(kv_memory=str(need // 4), max_model_len=256, max_num_seqs=64, **options)
    assert [o.outputs for o in small.generate(prompts, params)] == [o.outputs for o in llm.generate(prompts, params)]
    assert small.engine.stats().preemptions > 0 or not options


def test_best_of_is_chosen_by_the_mean_logprob(llm: LLM) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 6, "max_tokens": 20, "stop": ["\n", "("]}
    (every,) = llm.generate(PROMPTS[0], SamplingParams(n=6, logprobs=0, **fields))

    def mean(choice: Choice) -> float:
        assert choice.logprobs is not None
        return sum(entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)) / len(choice.token_ids)

    ranked = sorted(every.outputs, key=lambda choice: -mean(choice))
    assert len({len(choice.token_ids) for choice in ranked}) > 1
    before = llm.engine.stats().tokens_computed
    (best,) = llm.generate(PROMPTS[0], SamplingParams(n=2, best_of=6, **fields))
    assert [choice.token_ids for choice in best.outputs] == [choice.token_ids for choice in ranked[:2]]
    assert [(choice.index, choice.logprobs) for choice in best.outputs] == [(0, None), (1, None)]
    generated = sum(len(choice.token_ids) for choice in every.outputs)
    assert best.usage.completion_tokens == generated
    # The prompt is there already; each sample's last token is never computed, but for those that a stop string ended late.
    assert llm.engine.stats().tokens_computed - before <= 6 + generated
    (shown,) = llm.generate(PROMPTS[0], SamplingParams(n=2, best_of=6, logprobs=0, **fields))
    assert [choice.logprobs for choice in shown.outputs] == [choice.logprobs for choice in ranked[:2]]


def test_a_sample_that_fails_is_not_the_best(llm: LLM) -> None:
    params = SamplingParams(best_of=2)
    samples = [OutputAssembler(llm.tokenizer, params) for _ in range(2)]
    samples[0].feed(SequenceOutput("a", 0, [5], [TokenLogprobs((-0.1, 1), [])]))
    samples[0].feed(SequenceOutput("a", 0, [], None, "error", "not finite"))
    samples[1].feed(SequenceOutput("a", 1, [6], [TokenLogprobs((-9.0, 1), [])], "length"))
    (choice,) = best_choices(samples, 1)
    assert (choice.index, choice.token_ids) == (0, [6])


def test_beams(llm: LLM) -> None:
    (found,) = llm.generate(PROMPTS[0], SamplingParams(n=3, beam_width=4, max_tokens=12, ignore_eos=True, logprobs=0))
    assert [choice.index for choice in found.outputs] == [0, 1, 2]
    totals = []
    for choice in found.outputs:
        assert choice.logprobs is not None
        assert (len(choice.token_ids), choice.finish_reason) == (12, "length")
        assert choice.text == llm.tokenizer.decode(choice.token_ids)
        totals.append(sum(entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)))
    assert totals == sorted(totals, reverse=True)
    (greedy,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0))
    assert greedy.outputs[0].logprobs is not None
    assert totals[0] >= sum(next(iter(entry.values())).logprob for entry in greedy.outputs[0].logprobs) - 1e-6
    one = SamplingParams(beam_width=4, max_tokens=12, ignore_eos=True)
    assert "".join(llm.stream(PROMPTS[0], one)) == found.outputs[0].text
    assert not llm.engine.has_work
    with pytest.raises(InvalidRequestError, match="32 beams of up to 2,048 tokens may need"):
        llm.generate(PROMPTS, SamplingParams(beam_width=32, max_tokens=None))
    for params, name in ((SamplingParams(n=2), "n=2"), (SamplingParams(best_of=3), "best_of=3")):
        with pytest.raises(InvalidRequestError, match=f"one sample, got {name}"):
            llm.stream(PROMPTS[0], params)


def test_the_prefix_cache_and_its_salts() -> None:
    llm = LLM(kv_memory="16MiB")
    prompt, params = "x = 1\n" * 40, SamplingParams(temperature=0, max_tokens=4)

    def cached(**options: Any) -> int:
        (output,) = llm.generate(prompt, params, **options)
        assert output.outputs == first.outputs
        return output.usage.cached_tokens

    (first,) = llm.generate(prompt, params)
    most = len(first.prompt_token_ids) - 1
    assert first.usage.cached_tokens == 0
    assert cached() == most
    before = llm.engine.stats().tokens_computed
    assert [cached(cache_salt=salt) for salt in ("a", "b", "a")] == [0, 0, most]
    assert llm.engine.stats().tokens_computed - before == 2 * (most + 4) + 4
    llm.reset_prefix_cache()
    assert cached() == 0
    assert cached(retention=Retention(50, 60.0)) == most
    both = llm.generate([prompt, prompt], SamplingParams(temperature=0, max_tokens=4, n=2))
    assert [output.usage.cached_tokens for output in both] == [most, most]


def test_scheduling_options_are_checked(llm: LLM) -> None:
    for options, words in (
        ({"priority": [1, 2]}, "3 prompts but 2 priorities"),
        ({"priority": 1 << 31}, "priority must be from -2147483648 to 2147483647"),
        ({"priority": "low"}, "priority must be an integer, got 'low'"),
        ({"priority": [1, 2, "x"]}, "priority must be an integer"),
        ({"cache_salt": ""}, "1 to 128 characters, got 0"),
        ({"cache_salt": b"raw"}, "1 to 128 characters, got b'raw'"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            llm.generate(PROMPTS, SamplingParams(max_tokens=1), **options)  # type: ignore[arg-type]
    for arguments, words in (((0, 1.0), "from 1 to 100"), ((1, 0), "above 0"), ((1, float("nan")), "86400"), ((True, 1), "an integer")):
        with pytest.raises(InvalidRequestError, match=words):
            Retention(*arguments)
    assert not llm.engine.has_work


def test_priorities_are_the_order_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also among more prompts than may wait at a time."""
    llm = LLM(kv_memory="16MiB", max_num_seqs=1, max_waiting=2)
    ended: list[str] = []
    step = llm.engine.step

    def watched() -> list[SequenceOutput]:
        outputs = step()
        ended.extend(output.request_id for output in outputs if output.finish_reason)
        return outputs

    monkeypatch.setattr(llm.engine, "step", watched)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    outputs = llm.generate(["a"] * 7, params, priority=[3, 0, 2, -1, 2, 1, 0])
    assert ended == ["3", "1", "6", "5", "2", "4", "0"]
    assert [output.request_id for output in outputs] == list("0123456")


def test_more_prompts_than_may_wait(llm: LLM) -> None:
    """Offline nobody is refused: prompts, samples and streams are given to the engine as it has room."""
    small = LLM(kv_memory="16MiB", max_num_seqs=2, max_waiting=2)
    params = SamplingParams(n=3, seed=1, max_tokens=5)
    prompts = [f"x{i} = " for i in range(20)]
    assert [o.outputs for o in small.generate(prompts, params)] == [o.outputs for o in llm.generate(prompts, params)]
    one = SamplingParams(temperature=0, max_tokens=5)
    small.engine.add(Request("others", [5] * 20, SamplingParams(n=6, max_tokens=8, ignore_eos=True), 0))
    assert small.engine.stats().waiting > 2
    text = "".join(small.stream(prompts[0], one))
    assert text == llm.generate(prompts[0], one)[0].outputs[0].text


def test_preemptions_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    small = LLM(kv_memory="1MiB", max_model_len=256, admission="watermark")
    small.generate([f"def function_{i}(argument):" for i in range(24)], SamplingParams(max_tokens=100, ignore_eos=True))
    assert small.engine.stats().preemptions > 0
    lines = [record.getMessage() for record in caplog.records if record.name == "quire.engine"]
    assert lines
    assert "was preempted" in lines[0]


def test_structured_output(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    forms = [Structured.json(schema), Structured.regex("[ab]{4}"), Structured.choice(["x", "yz"])]
    outputs = llm.generate(PROMPTS, [SamplingParams(structured=form, max_tokens=64, seed=1) for form in forms])
    texts = [output.outputs[0].text for output in outputs]
    assert isinstance(json.loads(texts[0])["n"], int)
    assert re.fullmatch("[ab]{4}", texts[1])
    assert texts[2] in ("x", "yz")
    assert "".join(llm.stream(PROMPTS[1], SamplingParams(structured=forms[1], seed=1))) == texts[1]
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        llm.generate("a", SamplingParams(structured=Structured.regex("(")))


def test_log_probabilities_of_a_prompt(llm: LLM) -> None:
    """Those of its own tokens, the same as when they are generated; and a prompt alone, with nothing generated."""
    made = llm.generate("import os\n", SamplingParams(temperature=0, max_tokens=8, logprobs=2, ignore_eos=True))[0]
    whole = [*made.prompt_token_ids, *made.outputs[0].token_ids]
    scored = llm.generate({"prompt_token_ids": whole}, SamplingParams(max_tokens=0, prompt_logprobs=2))[0]
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    assert scored.prompt_logprobs[-8:] == made.outputs[0].logprobs
    assert (scored.outputs[0].text, scored.outputs[0].finish_reason) == ("", "length")
    assert made.prompt_logprobs is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_goes_on_after_an_interrupted_step(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(kv_memory="16MiB", threads=1)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    expected = [result.outputs[0].text for result in llm.generate(["import os", "def f("], params, use_tqdm=False)]
    execute, calls = llm.backend.execute, 0

    def fail(plan: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return execute(plan)

    stream = llm.stream("class A", params)
    assert next(stream) is not None
    with monkeypatch.context() as patch:
        patch.setattr(llm.backend, "execute", fail)
        with pytest.raises(error):
            llm.generate(["import os", "def f("], params, use_tqdm=False)
    with pytest.raises(EngineError, match="a step of the engine was interrupted"):
        list(stream)
    assert [result.outputs[0].text for result in llm.generate(["import os", "def f("], params, use_tqdm=False)] == expected


def test_forms_are_checked_before_anything_runs() -> None:
    llm = LLM(kv_memory="16MiB", threads=1, max_waiting=1)
    params = [SamplingParams(max_tokens=3)] * 6 + [SamplingParams(max_tokens=3, structured=Structured.regex("(?=a)"))]
    with pytest.raises(InvalidRequestError):
        llm.generate(["a"] * 7, params, use_tqdm=False)
    assert llm.engine.stats().steps == 0
