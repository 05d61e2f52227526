"""Tokenizer: text to token ids and back, from the files of a model folder. Never truncates, never pads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import tokenizers

from quire.errors import InvalidRequestError, ModelLoadError
from quire.gguf import read_gguf
from quire.text.chat import ChatTemplates, Message
from quire.text.gguf import gguf_tokenizer
from quire.text.pieces import PieceRules, piece_rules
from quire.text.special import SpecialText

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class JsonTexts(dict[int, bytes | None]):
    """Token id → its text within a text, as a JSON string in UTF-8. None for tokens whose text depends on others, or on what is asked
    for: parts of characters, special tokens, ids without a token. Filled as tokens come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes | None:
        text = None
        if token_id not in self._tokenizer.special_ids and (piece := self._tokenizer.piece(token_id)):
            with contextlib.suppress(UnicodeDecodeError):
                text = encode_basestring(piece.decode()).encode()
        self[token_id] = text
        return text


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads.

    ``decode`` gives what the tokenizers library gives, but for byte-fallback tokens that are not UTF-8 (see ``pieces``).
    tokenizer.json alone decides which special tokens ``encode`` adds.
    """

    __slots__ = ("_chat", "_pieces", "_special_text", "_tokenizer", "json_texts", "rules", "special_ids", "special_tokens")

    rules: PieceRules
    special_ids: frozenset[int]
    """Ids that ``skip_special_tokens`` leaves out of a text."""
    special_tokens: dict[str, str]
    """``bos_token``, ``eos_token`` ... → text, as far as the model folder names them."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: str | Mapping[str, str] | None = None,
    ) -> None:
        """Takes over ``tokenizer``. chat_templates: one template, or name → template.

        Raises ModelLoadError where the tokenizer's decoder is not supported.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.rules = piece_rules(tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else None)
        self.special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.special_tokens = dict(special_tokens or {})
        templates = {"default": chat_templates} if isinstance(chat_templates, str) else dict(chat_templates or {})
        self._chat = ChatTemplates(templates, self.special_tokens) if templates else None
        self._special_text = SpecialText(tokenizer)
        self._pieces: dict[int, bytes] = {}
        self.json_texts = JsonTexts(self)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and additional_chat_templates in
        ``folder``.

        Only tokenizer.json must be there. ``folder`` may also be a GGUF file, which holds all of this. Raises ModelLoadError, naming the
        file.
        """
        if folder.is_file():
            made, roles, templates = gguf_tokenizer(read_gguf(folder))
            return cls(made, special_tokens=roles, chat_templates=templates)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadError(
                f"{folder} has no tokenizer.json, the tokenizer in the format of the tokenizers library: download it with the model, or "
                "convert the model's tokenizer with transformers (AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises nothing more specific
            raise ModelLoadError(f"{path} can't be loaded: {e}") from None
        special: dict[str, str] = {}
        config = _read_json(folder / "tokenizer_config.json")
        for source in (_read_json(folder / "special_tokens_map.json"), config):
            for name in SPECIAL_TOKENS:
                value = source.get(name)
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    special[name] = text
        _add_tokens(tokenizer, special.values(), config, folder / "tokenizer_config.json")
        return cls(tokenizer, special_tokens=special, chat_templates=_chat_templates(folder, config))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model may have more rows in its embedding than that."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)

    @property
    def added_tokens(self) -> dict[int, str]:
        """Tokens that are found in a text before it is cut into others: id → text. The special ones are among them."""
        return {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}

    def token_id(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary, or None."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """All tokens of ``text``. Raises InvalidRequestError for text that is not Unicode or that the model can't spell."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` for several texts; the library spreads more than one over its threads."""
        for text in texts:
            _check_unicode(text)
        try:
            return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]
        except Exception as e:  # the library raises nothing more specific
            raise InvalidRequestError(f"the prompt can't be tokenized: {e}", param="prompt") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; invalid UTF-8 becomes U+FFFD. Raises InvalidRequestError for an id that is not in the vocabulary."""
        pieces: list[bytes] = []
        for i in ids:
            piece = self.piece(i)
            if piece is None:
                raise InvalidRequestError(f"token id {i} is not in the vocabulary, which has {self.vocab_size} tokens", param="tokens")
            if not (skip_special_tokens and i in self.special_ids):
                pieces.append(piece if pieces else self.head_piece(i))
        text, rules = b"".join(pieces).decode("utf-8", self.rules.errors), self.rules
        for _ in range(rules.strip_count):
            text = text.removeprefix(rules.strip)
        return text

    def piece(self, token_id: int) -> bytes | None:
        """Bytes that a token contributes to a text, anywhere but at its start; None for an id without a token."""
        piece = self._pieces.get(token_id)
        if piece is None and (token := self._token(token_id)) is not None:
            piece = self._pieces[token_id] = self.rules.middle(token)
        return piece

    def head_piece(self, token_id: int) -> bytes:
        """Bytes that a token of the vocabulary contributes as the first token of a text (before ``rules.strip``)."""
        return self.rules.head(self._token(token_id) or "")

    def _token(self, token_id: int) -> str | None:
        try:
            return self._tokenizer.id_to_token(token_id)
        except OverflowError:  # negative, or wider than 32 bits
            return None

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token within a text; special tokens are spelt out. Empty for an id without a token."""
        return self.piece(token_id) or b""

    def token_text(self, token_id: int) -> str:
        """``token_bytes`` as text; a token that holds a part of a character has U+FFFD for it."""
        return self.token_bytes(token_id).decode("utf-8", self.rules.errors)

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def has_special_text(self, value: Any) -> bool:
        """Whether a string of a JSON value spells a special token out."""
        return self._special_text.within(value)

    def shown(self, text: str) -> str:
        """What ``render_chat`` made, as text without the signs of ``plain_messages``."""
        return self._special_text.mend(text)

    def encode_chat(self, text: str, add_special_tokens: bool = False) -> tuple[str, list[int]]:
        """What ``render_chat`` made: as text, and as tokens. Text in messages is no special token where it was to be plain."""
        _check_unicode(text)
        try:
            ids = self._special_text.encode(text, add_special_tokens)
        except InvalidRequestError:
            raise
        except Exception as e:  # the library raises nothing more specific
            raise InvalidRequestError(f"the prompt can't be tokenized: {e}", param="prompt") from None
        return self._special_text.mend(text), self.encode(text, add_special_tokens) if ids is None else ids

    @property
    def chat_template(self) -> str:
        """The source of the model's chat templates, to look for words in it; empty where it has none."""
        return "" if self._chat is None else self._chat.source

    @property
    def default_chat_template(self) -> str | None:
        """The source of the chat template that is used where there is nothing special; None where the model has none."""
        return None if self._chat is None else self._chat.default

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        plain_messages: bool = False,
    ) -> str:
        """The conversation as the model's prompt, special tokens included: encode it with ``add_special_tokens=False``.

        plain_messages: special tokens are the template's alone, and the same text in a message or a variable is text. The prompt is for
        ``encode_chat`` then.

        add_generation_prompt opens the assistant's turn; continue_final_message leaves the last message open instead.
        template_kwargs are variables for the template; ``tools`` and ``documents`` go there too.
        Raises InvalidRequestError where the messages, or the template for these messages, are at fault.
        """
        if self._chat is None:
            raise InvalidRequestError(
                "this model has no chat template, so it does not know what a conversation looks like: use /v1/completions with a plain "
                "prompt, or add a chat_template.jinja to the model folder",
                param="messages",
            )
        plain = self._special_text.break_up if plain_messages else None
        return self._chat.render(messages, add_generation_prompt, continue_final_message, template_kwargs or {}, plain)


def _add_tokens(tokenizer: tokenizers.Tokenizer, roles: Iterable[str], config: Mapping[str, Any], path: Path) -> None:
    """What tokenizer_config.json says of added tokens goes before tokenizer.json, and tokens with a role are special: as in transformers.

    ``path``: of tokenizer_config.json. Raises ModelLoadError.
    """
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added = tokenizer.get_added_tokens_decoder()
    entries = {}
    try:
        for i, entry in (config.get("added_tokens_decoder") or {}).items():
            entries[int(i)] = entry["content"], {name: bool(entry[name]) for name in flags if name in entry}
        if not all(isinstance(text, str) for text, _ in entries.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelLoadError(f"{path}: 'added_tokens_decoder' must have an object with 'content' for each token's id") from None
    for token_id, (text, given) in sorted(entries.items()):
        if (there := added.get(token_id)) and there.content == text and all(getattr(there, name) == flag for name, flag in given.items()):
            continue
        token = tokenizers.AddedToken(text, **given)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if (found := tokenizer.token_to_id(text)) != token_id:
            raise ModelLoadError(
                f"{path} has the added token {text!r:.60} at {token_id}, tokenizer.json at {found}: they belong to two models"
            )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for text in dict.fromkeys(roles):
        if text not in known and tokenizer.token_to_id(text) is not None:
            tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequestError(
            f"the prompt is not valid Unicode: character {e.start} is a lone surrogate (U+{ord(text[e.start]):04X})", param="prompt"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ModelLoadError(f"{path} can't be read: {e}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name → template. A chat_template.jinja goes before tokenizer_config.json, as in transformers."""
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = {"default": folder / "chat_template.jinja"} | {path.stem: path for path in others}
    found = {}
    for name, path in files.items():
        if path.is_file():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as e:
                raise ModelLoadError(f"{path} can't be read: {e}") from None
    if found:
        return found
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        named = {str(entry["name"]): entry["template"] for entry in template}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(text, str) for text in named.values()):
        raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of {{name, template}}")
    return named
