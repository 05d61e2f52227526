"""From engine outputs to what a client sees."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.outputs import Logprob, SequenceOutput, TokenLogprobs
from quire.sampling_params import SamplingParams
from quire.text.output import OutputAssembler, best_choices
from quire.text.tokenizer import Tokenizer
from quire.text.tools import Message, parse_message, parser_for
from sample_tokenizers import sample

BYTES = Tokenizer(sample("byte_level"))
LLAMA = Tokenizer(sample("llama"))
END = BYTES.token_id("<|end|>") or 0


def tokens(text: str) -> list[int]:
    return BYTES.encode(text)


def feed_all(assembler: OutputAssembler, ids: list[int], finish: str | None = "length", reason: int | None = None, step: int = 1) -> str:
    text = ""
    for at in range(0, len(ids), step):
        last = at + step >= len(ids)
        text += assembler.feed(SequenceOutput("r", 0, ids[at : at + step], None, finish if last else None, reason if last else None)).text
        if assembler.finished:
            break
    return text


@given(st.lists(st.integers(0, BYTES.vocab_size - 1), min_size=1, max_size=30), st.integers(1, 5), st.booleans())
def test_text_is_the_decoded_tokens(ids: list[int], step: int, skip: bool) -> None:
    assembler = OutputAssembler(BYTES, SamplingParams(skip_special_tokens=skip))
    text = feed_all(assembler, ids, step=step)
    choice = assembler.choice(3)
    assert text == choice.text == BYTES.decode(ids, skip)
    assert (choice.index, choice.token_ids, choice.finish_reason, choice.stop_reason) == (3, ids, "length", None)
    assert assembler.finished


@given(st.integers(1, 9), st.booleans())
def test_a_stop_string_ends_the_sequence(step: int, include: bool) -> None:
    ids = tokens("The quick brown fox jumps")
    params = SamplingParams(stop=["wn f", "quack"], include_stop_str_in_output=include)
    assembler = OutputAssembler(BYTES, params)
    text = feed_all(assembler, ids, step=step)
    choice = assembler.choice(0)
    assert text == choice.text == "The quick bro" + ("wn f" if include else "")
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "wn f")
    kept = BYTES.decode(choice.token_ids)
    assert "wn f" in kept
    assert "wn f" not in BYTES.decode(choice.token_ids[:-1])
    assert assembler.feed(SequenceOutput("r", 0, ids, None, "abort")).token_ids == [], "nothing after the end"
    assert assembler.choice(0).finish_reason == "stop"


@given(st.integers(1, 60), st.booleans())
def test_a_message_that_is_complete_ends_the_sequence(step: int, parallel: bool) -> None:
    """With the token that completes it, however many come at once."""
    one = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    ids = tokens(f"I call. {one} and {one}")
    parser = parser_for("hermes", ["f"], parallel=parallel)
    assembler = OutputAssembler(BYTES, SamplingParams(), parser=parser)
    message = Message()
    for at in range(0, len(ids), step):
        last = at + step >= len(ids)
        delta = assembler.feed(SequenceOutput("r", 0, ids[at : at + step], None, "length" if last else None))
        assert delta.message is not None
        message.add(delta.message)
    choice = assembler.choice(0)
    assert [call.arguments for call in message.calls] == ['{"a": 1}'] * (2 if parallel else 1)
    if parallel:
        assert (choice.token_ids, choice.finish_reason) == (ids, "length")
    else:
        assert parser.done
        assert choice.finish_reason == "stop"
        assert BYTES.decode(choice.token_ids) == f"I call. {one}".removesuffix("</tool_call>")
    assert message == parse_message(parser_for("hermes", ["f"], parallel=parallel), choice.text)


def test_held_back_text_comes_at_the_end() -> None:
    assembler = OutputAssembler(BYTES, SamplingParams(stop="fox!"))
    assert feed_all(assembler, tokens("a fox"), finish=None) == "a "
    delta = assembler.feed(SequenceOutput("r", 0, [], None, "abort"))
    assert (delta.text, delta.finish_reason) == ("fox", "abort")


def test_end_of_text_has_no_text() -> None:
    for skip in (True, False):
        assembler = OutputAssembler(BYTES, SamplingParams(skip_special_tokens=skip))
        assert feed_all(assembler, [*tokens("a fox"), END], "stop") == "a fox"
        assert assembler.choice(0).token_ids[-1] == END
    assembler = OutputAssembler(BYTES, SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True))
    assert feed_all(assembler, [*tokens("a fox"), END], "stop") == "a fox<|end|>"


def test_a_stop_token_has_no_text() -> None:
    ids = tokens("a fox.")
    assembler = OutputAssembler(BYTES, SamplingParams(stop_token_ids=[ids[-1]]))
    assert feed_all(assembler, ids, "stop", ids[-1]) == "a fox"
    assert assembler.choice(0).stop_reason == ids[-1]


def test_min_tokens_holds_for_stop_strings() -> None:
    ids = [*tokens("a")] * 8
    for min_tokens in (0, 1, 5):
        assembler = OutputAssembler(BYTES, SamplingParams(stop="aa", min_tokens=min_tokens))
        feed_all(assembler, ids)
        choice = assembler.choice(0)
        assert len(choice.token_ids) == max(2, min_tokens + 1)
        assert choice.text == "a" * (len(choice.token_ids) - 2)


def test_logprobs() -> None:
    first, second = tokens("a"), tokens("b")
    top = [(second[0], -0.1), (first[0], -2.5), (END, -3.0)]
    given_logprobs = [TokenLogprobs((-2.5, 2), top), TokenLogprobs((-9.0, 40), top[:1])]
    assembler = OutputAssembler(BYTES, SamplingParams(logprobs=3))
    delta = assembler.feed(SequenceOutput("r", 0, [first[0], 7], given_logprobs, "length"))
    assert delta.logprobs is not None
    assert list(delta.logprobs[0].items()) == [
        (first[0], Logprob(-2.5, 2, "a")),
        (second[0], Logprob(-0.1, 1, "b")),
        (END, Logprob(-3.0, 3, "<|end|>")),
    ]
    assert [list(entry) for entry in delta.logprobs] == [[first[0], second[0], END], [7, second[0]]]
    assert assembler.choice(0).logprobs == delta.logprobs


def test_logprobs_end_with_the_stop_string() -> None:
    ids = tokens("abc")
    logprobs = [TokenLogprobs((-1.0, 1), []) for _ in ids]
    assembler = OutputAssembler(BYTES, SamplingParams(logprobs=0, stop="a"))
    delta = assembler.feed(SequenceOutput("r", 0, ids, logprobs))
    assert len(delta.token_ids) == len(delta.logprobs or ()) == 1


def test_a_continuation_of_the_prompt() -> None:
    ids = LLAMA.encode("the bones", add_special_tokens=False)
    assert feed_all(OutputAssembler(LLAMA, SamplingParams()), ids) == "the bones"
    assert feed_all(OutputAssembler(LLAMA, SamplingParams(), LLAMA.encode("on")), ids) == " the bones"


def test_without_a_tokenizer() -> None:
    assembler = OutputAssembler(None, SamplingParams(logprobs=0))
    delta = assembler.feed(SequenceOutput("r", 0, [5], [TokenLogprobs((-1.0, 1), [])], "length"))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [5], "length")


def test_the_best_samples() -> None:
    """By the mean and not the sum; the lower index among equals; whole where there is nothing to choose."""

    def sample(*values: float) -> OutputAssembler:
        assembler = OutputAssembler(BYTES, SamplingParams(best_of=4))
        for value in values:
            assembler.feed(SequenceOutput("r", 0, [len(values)], [TokenLogprobs((value, 1), [])]))
        return assembler

    samples = [sample(-1.0), sample(-0.5, -0.5, -0.5), sample(-0.25, -0.75), sample(-float("inf"))]
    assert samples[1].mean_logprob == samples[2].mean_logprob == -0.5
    assert [(choice.index, len(choice.token_ids)) for choice in best_choices(samples, 2, 10)] == [(10, 3), (11, 2)]
    assert [len(choice.token_ids) for choice in best_choices(samples, 4)] == [1, 3, 2, 1]
    assert all(choice.logprobs is None for choice in best_choices(samples, 3))


def test_tokens_after_a_stop_string_do_not_count() -> None:
    assembler = OutputAssembler(BYTES, SamplingParams(best_of=2, stop="a"))
    ids = tokens("xa") + tokens("bb")
    ids = [token for token in ids if BYTES.decode([token])]
    values = [-1.0] * len(ids)
    values[-1] = -100.0
    assembler.feed(SequenceOutput("r", 0, ids, [TokenLogprobs((value, 1), []) for value in values]))
    assert assembler.finished
    assert assembler.mean_logprob == -1.0


def test_the_last_token_of_a_complete_form_is_text() -> None:
    """Where a form was complete no token ended the sequence; else the last one did, and has no text."""
    ids = [*tokens('{"a": 1}'), END]
    for params in (SamplingParams(), SamplingParams(skip_special_tokens=False)):
        ended = OutputAssembler(BYTES, params).feed(SequenceOutput("r", 0, ids, None, "stop"))
        complete = OutputAssembler(BYTES, params).feed(SequenceOutput("r", 0, ids[:-1], None, "stop", end_token=False))
        assert ended.text == complete.text == '{"a": 1}'
        assert (complete.finish_reason, complete.stop_reason) == ("stop", None)
