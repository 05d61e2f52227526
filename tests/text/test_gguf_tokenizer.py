"""Tokenizers of GGUF files against the ones that the files were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from quire.errors import ModelLoadError
from quire.text.gguf import _WORDS
from quire.text.tokenizer import Tokenizer
from sample_gguf import tiny_fields, tokenizer_fields, write_gguf
from sample_tokenizers import CORPUS, llama

TEXTS = [
    "", " ", "\n", "  two  spaces ", "The quick brown fox", "größer, naïve, 你好世界, 🙂🙃\u200d",
    "it's WE'LL 'RE 12345 3.14 3..3", "\t\r\n x\n\n y ", "def f(x):\n    return x + 1  # comment", "កាន់តែពិសេស", "a\u0301 combining",
    "tokens in one word: reservations;  blocks", "ends in a space ",
]  # fmt: skip
# As tokenizer.json of Llama 3 has it.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(cut: Any, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """Trained with whatever cuts texts into words before."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = cut
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(["<|begin|>", "<|im_end|>"])
    made.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return made


def fields_of(made: tokenizers.Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes them."""
    vocabulary = made.get_vocab(with_added_tokens=True)
    added = {token.content: 3 if token.special else 4 for token in made.get_added_tokens_decoder().values()}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
    return tokenizer_fields() | {
        "general.architecture": "llama", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [added.get(token, 1) for token in tokens], "tokenizer.ggml.bos_token_id": vocabulary["<|begin|>"],
        "tokenizer.ggml.eos_token_id": vocabulary["<|im_end|>"], **more,
    }  # fmt: skip


CUTS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "smaug-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_byte_level(tmp_path: Path, name: str) -> None:
    made = byte_level(CUTS[name])
    read = Tokenizer.load(write_gguf(tmp_path / "a.gguf", fields_of(made, name), {}))
    for text in [*TEXTS, "<|begin|>a<|im_end|> <think>b", "".join(TEXTS)]:
        ids = made.encode(text, add_special_tokens=False).ids
        assert read.encode(text) == ids  # no token begins a text unless the file says so
        assert read.decode(ids, skip_special_tokens=False) == text
    assert read.special_tokens["eos_token"] == "<|im_end|>"
    assert read.special_ids == {made.token_to_id("<|begin|>"), made.token_to_id("<|im_end|>")}
    assert read.vocab_size == made.get_vocab_size()


def test_words_that_are_tokens_and_what_begins_a_text(tmp_path: Path) -> None:
    """Llama 3 takes a word that is a token as it is, whatever the merges say, and begins texts with a token."""
    made = byte_level(CUTS["smaug-bpe"])
    begin = made.token_to_id("<|begin|>")
    fields = fields_of(made, "llama-bpe")
    fields["tokenizer.ggml.tokens"][-1] = "zzz"  # instead of <think>; no merge makes it
    fields["tokenizer.ggml.token_type"][-1] = 1
    read = Tokenizer.load(write_gguf(tmp_path / "a.gguf", fields, {}))
    assert read.encode("zzz") == [begin, read.vocab_size - 1]
    assert Tokenizer.load(write_gguf(tmp_path / "b.gguf", fields | {"tokenizer.ggml.pre": "smaug-bpe"}, {})).encode("zzz") != [
        read.vocab_size - 1
    ]
    no_bos = fields | {"tokenizer.ggml.add_bos_token": False}
    assert Tokenizer.load(write_gguf(tmp_path / "c.gguf", no_bos, {})).encode("zzz") == [read.vocab_size - 1]
    both = fields | {"tokenizer.ggml.add_eos_token": True}
    assert Tokenizer.load(write_gguf(tmp_path / "d.gguf", both, {})).encode("zzz") == [begin, read.vocab_size - 1, read.eos_token_id]


def sentence_piece(**more: Any) -> dict[str, Any]:
    """The fields of sample_tokenizers.llama: scores instead of merges, the earliest merge with the highest."""
    made = llama()
    state = json.loads(made.to_str())
    vocabulary = made.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    rank = {"".join(merge if isinstance(merge, list) else merge.split(" ")): i for i, merge in enumerate(state["model"]["merges"])}
    types = [2 if t == "<unk>" else 3 if t in ("<s>", "</s>") else 6 if t.startswith("<0x") else 1 for t in tokens]
    return {
        "general.architecture": "llama", "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(token, 1000)) for token in tokens], "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, **more,
    }  # fmt: skip


def test_sentence_piece(tmp_path: Path) -> None:
    made = llama()
    read = Tokenizer.load(write_gguf(tmp_path / "a.gguf", sentence_piece(), {}))
    for text in TEXTS:
        assert read.encode(text) == made.encode(text).ids
        assert read.decode(read.encode(text)) == made.decode(made.encode(text).ids)
    plain = Tokenizer.load(write_gguf(tmp_path / "b.gguf", sentence_piece(**{"tokenizer.ggml.add_space_prefix": False}), {}))
    for text in TEXTS:
        assert plain.encode(text) == llama(strip=False).encode(text).ids
        assert plain.decode(plain.encode(text)) == text


def test_sentence_piece_without_ids(tmp_path: Path) -> None:
    """Its special tokens have ids that a file need not say, and <unk> is one of them."""
    fields = {name: value for name, value in sentence_piece().items() if not name.endswith("_token_id")}
    read = Tokenizer.load(write_gguf(tmp_path / "a.gguf", fields, {}))
    assert read.encode("a") == llama().encode("a").ids
    assert (read.bos_token_id, read.eos_token_id, read.special_tokens["unk_token"]) == (1, 2, "<unk>")
    assert 0 in read.special_ids


def test_what_is_not_utf_8(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(tokenizer__chat_template="xyzzy"), {})
    whole = path.read_bytes()
    for old, new, part in ((b"xyzzy", b"xy\xff\xffy", "has something else than UTF-8 in tokenizer.chat_template"),
                           (b"\1\0\0\0\0\0\0\0q", b"\1\0\0\0\0\0\0\0\xff", "has a token that is not UTF-8 (number 20)")):  # fmt: skip
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ModelLoadError) as error:
            Tokenizer.load(path)
        assert part in error.value.message


def test_tokens_of_phi_3_swallow_the_space_behind_them(tmp_path: Path) -> None:
    fields = sentence_piece()
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "<|user|>"]
    fields["tokenizer.ggml.scores"] = [*fields["tokenizer.ggml.scores"], -1000.0]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], 3]
    others = Tokenizer.load(write_gguf(tmp_path / "a.gguf", fields, {})).encode("<|user|>\n<s>\n")
    phi = Tokenizer.load(write_gguf(tmp_path / "b.gguf", fields | {"general.architecture": "phi3"}, {})).encode("<|user|>\n<s>\n")
    assert len(phi) == len(others) - 2  # the mark of a space, and the line's end, but behind <|user|> alone


def test_chat_templates(tmp_path: Path) -> None:
    fields = tiny_fields(tokenizer__chat_template="{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    read = Tokenizer.load(write_gguf(tmp_path / "a.gguf", fields, {}))
    assert read.render_chat([{"role": "user", "content": "hi"}]) == "<s>[user] hi"
    fields |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools!"}
    read = Tokenizer.load(write_gguf(tmp_path / "b.gguf", fields, {}))
    assert read.render_chat([{"role": "user", "content": "hi"}], template_kwargs={"tools": [{}]}) == "tools!"
    assert not Tokenizer.load(write_gguf(tmp_path / "c.gguf", tiny_fields(), {})).has_chat_template
    assert not Tokenizer.load(write_gguf(tmp_path / "d.gguf", tiny_fields(tokenizer__chat_template=""), {})).has_chat_template
    # Where texts begin with a token, prompts do, be it that the template leaves it to whoever runs the model.
    silent = sentence_piece(**{"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    read = Tokenizer.load(write_gguf(tmp_path / "e.gguf", silent, {}))
    assert read.render_chat([{"role": "user", "content": "hi"}]) == "<s>hi"
    silent["tokenizer.ggml.add_bos_token"] = False
    read = Tokenizer.load(write_gguf(tmp_path / "f.gguf", silent, {}))
    assert read.render_chat([{"role": "user", "content": "hi"}]) == "hi"


@pytest.mark.parametrize(("changes", "part"), [
    ({"tokenizer__ggml__model": "bert"}, "a tokenizer of the kind 'bert'; supported: gpt2"),
    ({"tokenizer__ggml__model": None}, "a tokenizer of the kind 'none'"),
    ({"tokenizer__ggml__pre": "what"}, "cuts texts into words as 'what' does"),
    ({"tokenizer__ggml__tokens": None, "tokenizer__ggml__token_type": None}, "has no tokens"),
    ({"tokenizer__ggml__tokens": ["a"] * 32}, "has 31 tokens twice"),
    ({"tokenizer__ggml__token_type": [1, 1]}, "has 2 entries in tokenizer.ggml.token_type and needs 32"),
    ({"tokenizer__ggml__merges": None}, "has no tokenizer.ggml.merges"),
    ({"tokenizer__ggml__tokens": ["a" * 2000, *map(str, range(31))]}, "has a token that is too long (number 0)"),
    ({"tokenizer__ggml__merges": ["ab"]}, "has the merge 'ab', which is not two tokens"),
    ({"tokenizer__ggml__merges": ["a q"]}, "has a tokenizer that can't be made"),
    ({"tokenizer__ggml__merges": [1, 2]}, "something else in tokenizer.ggml.merges than a list of str"),
    ({"tokenizer__ggml__model": "llama"}, "has no tokenizer.ggml.scores"),
    ({"tokenizer__ggml__add_bos_token": 1}, "has 1 in tokenizer.ggml.add_bos_token, which must be true or false"),
    ({"tokenizer__chat_template": 7}, "has 7 in tokenizer.chat_template, which must be a text"),
])  # fmt: skip
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        Tokenizer.load(write_gguf(tmp_path / "a.gguf", tiny_fields(**changes), {}))
    assert part in error.value.message


@pytest.mark.parametrize("name", sorted(_WORDS))
def test_every_way_to_cut_is_whole(tmp_path: Path, name: str) -> None:
    """The expressions are ones that the library takes, and lose nothing of a text."""
    made = byte_level(CUTS["gpt-2"])
    read = Tokenizer.load(write_gguf(tmp_path / "a.gguf", fields_of(made, name), {}))
    for text in TEXTS:
        assert read.decode(read.encode(text, add_special_tokens=False)) == text
