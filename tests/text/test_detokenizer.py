"""Token by token gives the text of the whole; and the whole is what the tokenizers library says."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.text.detokenizer import Detokenizer
from quire.text.tokenizer import Tokenizer
from sample_tokenizers import CORPUS, KINDS, sample

TOKENIZERS = {kind: Tokenizer(sample(kind)) for kind in KINDS}

kinds = st.sampled_from(sorted(KINDS))
texts = st.lists(
    st.sampled_from([*CORPUS, " ", "  ", "é", "🙂", "你", "\x00", "<|end|>", "<think>", "</s>"]) | st.text(max_size=5), max_size=6
).map("".join)


def token_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, byte tokens and the last (added) ones more often."""
    size = TOKENIZERS[kind].vocab_size
    return st.lists(st.integers(0, size - 1) | st.integers(max(0, size - 6), size - 1) | st.integers(0, min(size - 1, 260)), max_size=40)


any_tokens = kinds.flatmap(lambda kind: st.tuples(st.just(kind), token_ids(kind)))


@given(any_tokens, st.booleans())
def test_pieces_joined_are_the_whole(kind_and_ids: tuple[str, list[int]], skip: bool) -> None:
    kind, ids = kind_and_ids
    detokenizer = Detokenizer(TOKENIZERS[kind], skip)
    pieces = [detokenizer.push(i) for i in ids] + [detokenizer.finish()]
    assert "".join(pieces) == TOKENIZERS[kind].decode(ids, skip)


@given(any_tokens, st.booleans(), st.text(max_size=3))
def test_what_is_text_by_itself_may_go_past_the_detokenizer(kind_and_ids: tuple[str, list[int]], skip: bool, prompt: str) -> None:
    kind, ids = kind_and_ids
    tokenizer = TOKENIZERS[kind]
    seen = tokenizer.encode(prompt)
    told, asked = Detokenizer(tokenizer, skip, seen), Detokenizer(tokenizer, skip, seen)
    for token_id in ids:
        expected, text = told.push(token_id), tokenizer.json_texts[token_id]
        if text is not None and asked.between:
            assert json.loads(text) == expected
        else:
            assert asked.push(token_id) == expected
    assert asked.finish() == told.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_most_tokens_are_text_by_themselves(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    special = tokenizer.special_ids
    assert all(tokenizer.json_texts[token_id] is None for token_id in (*special, -1, tokenizer.vocab_size, 2**40))
    words = [i for i in range(tokenizer.vocab_size) if i not in special and tokenizer.token_bytes(i).isascii() and tokenizer.token_bytes(i)]
    assert words
    assert all(tokenizer.json_texts[i] == json.dumps(tokenizer.token_text(i)).replace("\\u007f", "\x7f").encode() for i in words)


def mixes_valid_and_invalid(kind: str, ids: list[int], skip: bool) -> bool:
    """Whether a run of byte tokens has both characters and invalid bytes; there the library replaces the characters too."""
    if kind not in ("llama", "gemma"):
        return False
    tokens = [sample(kind).id_to_token(i) for i in ids if not (skip and i in TOKENIZERS[kind].special_ids)]
    run = b""
    for token in [*tokens, ""]:
        if match := re.fullmatch("<0x(..)>", token):
            run += bytes.fromhex(match[1])
            continue
        if run.decode(errors="replace") != run.decode(errors="ignore") != "":
            return True
        run = b""
    return False


@given(any_tokens, st.booleans())
def test_the_whole_is_what_the_library_says(kind_and_ids: tuple[str, list[int]], skip: bool) -> None:
    kind, ids = kind_and_ids
    expected = sample(kind).decode(ids, skip_special_tokens=skip)
    got = TOKENIZERS[kind].decode(ids, skip)
    if not mixes_valid_and_invalid(kind, ids, skip):
        assert got == expected


@given(kinds, texts, st.booleans())
def test_encoded_text_comes_out_as_the_library_says(kind: str, text: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert ids == sample(kind).encode(text).ids
    assert tokenizer.decode(ids, skip) == sample(kind).decode(ids, skip_special_tokens=skip)
    detokenizer = Detokenizer(tokenizer, skip)
    assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == tokenizer.decode(ids, skip)


@given(any_tokens)
def test_at_most_three_bytes_are_held_back(kind_and_ids: tuple[str, list[int]]) -> None:
    kind, ids = kind_and_ids
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    shown = ""
    for n, token in enumerate(ids, start=1):
        shown += detokenizer.push(token)
        whole = tokenizer.decode(ids[:n], skip_special_tokens=False)
        assert whole.startswith(shown)
        assert len(whole) - len(shown) <= 3


@given(kinds, st.text("the bones are a öé🙂 ", max_size=20), st.text("the bones öé🙂 ", max_size=20))
def test_a_continuation_keeps_its_leading_space(kind: str, prompt: str, more: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(more, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, prompt=prompt_ids)
    text = "".join([*map(detokenizer.push, ids), detokenizer.finish()])
    assert tokenizer.decode(prompt_ids) + text == tokenizer.decode(prompt_ids + ids)


def test_characters_are_never_cut() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.token_id(c) for c in "ðŁĻĤ"]  # the four bytes of 🙂 in GPT-2's alphabet
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in ids if i is not None] == ["", "", "", "🙂"]
    assert detokenizer.finish() == ""


def test_an_incomplete_character_ends_as_in_decode() -> None:
    tokenizer = TOKENIZERS["llama"]
    ids = [tokenizer.token_id(f"<0x{b:02X}>") or 0 for b in "你".encode()[:2]]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in ids] == ["", ""]
    assert detokenizer.finish() == "\ufffd\ufffd" == sample("llama").decode(ids)


def test_valid_characters_survive_an_invalid_byte() -> None:
    tokenizer = TOKENIZERS["llama"]
    ids = [tokenizer.token_id(f"<0x{b:02X}>") or 0 for b in [*"你".encode(), 0xFF, *"好".encode()]]
    assert tokenizer.decode(ids) == "你\ufffd好"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_without_a_token_have_no_text(kind: str) -> None:
    detokenizer = Detokenizer(TOKENIZERS[kind])
    assert detokenizer.push(100_000) == ""
    assert detokenizer.push(-1) == ""
