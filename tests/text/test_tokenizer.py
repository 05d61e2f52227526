"""Loading a model folder's tokenizer, and its edges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import decoders

from quire.errors import InvalidRequestError, ModelLoadError
from quire.text.tokenizer import Tokenizer
from sample_tokenizers import KINDS, sample, write_folder


def test_special_tokens_come_as_strings_or_objects(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama", {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None})
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "wrong", "unk_token": {"content": "<unk>"}}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert not tokenizer.has_chat_template


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[1]"), ("tokenizer_config.json", "{")])
def test_broken_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    write_folder(tmp_path, "words")
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelLoadError, match=name):
        Tokenizer.load(tmp_path)


def test_an_unsupported_decoder_is_refused() -> None:
    tokenizer = KINDS["words"]()
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(ModelLoadError, match="decoder that is not supported: CTC"):
        Tokenizer(tokenizer)


def test_nothing_is_truncated_or_padded(tmp_path: Path) -> None:
    made = KINDS["llama"]()
    made.enable_truncation(4)
    made.enable_padding(length=100)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the " * 20) == sample("llama").encode("the " * 20).ids
    assert tokenizer.encode_batch(["the", "the the"]) == [sample("llama").encode(t).ids for t in ("the", "the the")]


def test_special_tokens_are_added_on_request() -> None:
    tokenizer = Tokenizer(sample("llama"))
    assert tokenizer.encode("the", add_special_tokens=False) == tokenizer.encode("the")[1:]
    assert tokenizer.encode("")[0] == 1
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_vocab_size_counts_added_tokens() -> None:
    tokenizer = Tokenizer(sample("byte_level"))
    assert tokenizer.vocab_size == 404
    assert tokenizer.token_text(403) == "two words"


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"character 2 is a lone surrogate \(U\+D83D\)"):
        Tokenizer(sample("byte_level")).encode("ab\ud83d")


def test_text_that_the_model_cannot_spell() -> None:
    made = KINDS["words"]()
    made.model.unk_token = "absent"
    with pytest.raises(InvalidRequestError, match="can't be tokenized"):
        Tokenizer(made).encode("seven")


@pytest.mark.parametrize("token", [-1, 10**6, 1 << 40])
def test_unknown_ids(token: int) -> None:
    tokenizer = Tokenizer(sample("byte_level"))
    with pytest.raises(InvalidRequestError, match="404 tokens"):
        tokenizer.decode([5, token])
    assert tokenizer.token_bytes(token) == b""
    assert tokenizer.token_text(token) == ""


def test_bytes_of_tokens() -> None:
    byte_level, llama, metaspace = (Tokenizer(sample(kind)) for kind in ("byte_level", "llama", "metaspace"))

    def found(tokenizer: Tokenizer, token: str) -> bytes:
        token_id = tokenizer.token_id(token)
        assert token_id is not None
        return tokenizer.token_bytes(token_id)

    assert found(byte_level, "Ġthe") == b" the"
    assert found(byte_level, "ð") == b"\xf0"
    assert found(byte_level, "<|end|>") == b"<|end|>"
    assert found(llama, "<0xE4>") == b"\xe4"
    assert found(llama, "▁the") == b" the"
    assert found(llama, "</s>") == b"</s>"
    assert found(metaspace, "▁") == b" "
    assert llama.token_text(llama.token_id("<0xE4>") or 0) == "\ufffd"


def test_bytes_of_tokens_spell_the_text() -> None:
    tokenizer = Tokenizer(sample("byte_level"))
    text = "größer 🙂 你好  the\n"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_chat_template_forms(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    named = [{"name": "default", "template": "D{{ bos_token }}"}, {"name": "tool_use", "template": "T{{ tools|length }}"}]
    write_folder(tmp_path, "llama", {"bos_token": "<s>", "chat_template": named})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.render_chat(messages) == "D<s>"
    assert tokenizer.render_chat(messages, template_kwargs={"tools": [{"type": "function"}]}) == "T1"
    write_folder(tmp_path, "llama", {"chat_template": "{{ messages[0].content }}"})
    assert Tokenizer.load(tmp_path).render_chat(messages) == "hi"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path).render_chat(messages) == "from the file"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    with pytest.raises(ModelLoadError, match="chat_template must be"):
        Tokenizer.load(tmp_path)


def test_chat_templates_as_transformers_saves_them(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    write_folder(tmp_path, "llama", {})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T{{ tools|length }}")
    (tmp_path / "chat_template.jinja").write_text("D")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.render_chat(messages) == "D"
    assert tokenizer.render_chat(messages, template_kwargs={"tools": [{"type": "function"}]}) == "T1"


def test_added_tokens_are_those_of_tokenizer_config(tmp_path: Path) -> None:
    """A fine-tune whose tokenizer.json is older than its tokenizer_config.json; and tokens with a role that no file flags as special."""
    write_folder(tmp_path, "llama", {})
    plain = Tokenizer.load(tmp_path)
    size = plain.vocab_size
    added = {str(size): {"content": "<|im_start|>", "special": True}, str(size + 1): {"content": "<t>", "special": False}}
    write_folder(tmp_path, "llama", {"added_tokens_decoder": added, "eos_token": "<t>"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<|im_start|><t>", False) == [size, size + 1]
    assert {size, size + 1} <= tokenizer.special_ids
    assert tokenizer.eos_token_id == size + 1
    write_folder(tmp_path, "llama", {"added_tokens_decoder": {str(size + 7): {"content": "<x>"}}})
    with pytest.raises(ModelLoadError, match=rf"added token '<x>' at {size + 7}, tokenizer\.json at {size}: they belong to two models"):
        Tokenizer.load(tmp_path)
    for wrong in ({"one": {"content": "<x>"}}, {"9": {"content": 5}}, {"9": "<x>"}, ["<x>"]):
        write_folder(tmp_path, "llama", {"added_tokens_decoder": wrong})
        with pytest.raises(ModelLoadError, match="'added_tokens_decoder' must have an object with 'content'"):
            Tokenizer.load(tmp_path)


def test_without_a_chat_template() -> None:
    with pytest.raises(InvalidRequestError, match="use /v1/completions"):
        Tokenizer(sample("llama")).render_chat([{"role": "user", "content": "hi"}])
