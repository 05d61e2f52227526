"""The tokenizer of a GGUF file, as the tokenizers library has it.

Two kinds are read: ``gpt2``, byte-level BPE with its merges, whose texts are cut into words by regular expressions that the file names;
and ``llama``, SentencePiece's BPE, whose merges follow from the scores of the tokens. The names of the expressions, and which
vocabularies take a word that is a token as it is or begin every text with their token for it, are llama.cpp's (src/llama-vocab.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from quire.errors import ModelLoadError
from quire.gguf import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Gguf

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE: Final = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN: Final = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}"
_O200K: Final = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
_REST_OF_CASED: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK_KANA: Final = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PUNCTUATION: Final = r"[\p{P}\$\+<=>\^~\|`]+"


@dataclass(slots=True, frozen=True)
class _Words:
    """How texts are cut into words before bytes are merged."""

    expressions: tuple[str, ...]
    """One after the other, each within what the ones before have left; what they match and what lies between are words."""
    ignore_merges: bool = False
    """A word that is a token is that token."""
    bos: bool = False
    """Texts begin with the token for it, unless the file says otherwise."""


_WORDS: Final[dict[str, _Words]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4", "trillion", "gigachat", "a.x-4.0", "mellum"), _Words((_GPT2,))),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _Words((r"\p{N}", _GPT2))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
                    _Words((_LLAMA3,), ignore_merges=True, bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _Words((_LLAMA3,))),
    "glm4": _Words((_LLAMA3,), ignore_merges=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2", "kormo"), _Words((_QWEN2,))),
    "tekken": _Words((f"{_TEKKEN}|{_REST_OF_CASED}",), ignore_merges=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _Words((f"{_O200K}|{_REST_OF_CASED}",))),
    "seed-coder": _Words((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    "qwen35": _Words((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
                      r"|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    "deepseek-coder": _Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3": _Words((r"\p{N}{1,3}", _CJK_KANA,
                           r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
                           r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")),
    "falcon": _Words((_PUNCTUATION, _GPT2, "[0-9][0-9][0-9]")),
    "default": _Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}  # fmt: skip
"""``tokenizer.ggml.pre`` → how such a vocabulary's texts are cut."""

_ROLES: Final = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding", "mask_token": "mask",
}  # fmt: skip
"""Role → how the format spells it in ``tokenizer.ggml.…_token_id``."""
_SPACE: Final = "\u2581"
_LONGEST: Final = 1024
"""Characters of a token. Every way to cut one in two is looked at."""
_PLAIN: Final = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of Phi-3 that leave the white space behind them."""


def gguf_tokenizer(model: Gguf) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]:
    """(tokenizer, role → special token, name → chat template) of a GGUF file. Raises ModelLoadError."""
    kind = model.text("tokenizer.ggml.model", "none")
    if kind not in ("gpt2", "llama"):
        model.refuse(f"has a tokenizer of the kind {kind!r:.40}; supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)")
    given, types = model.tokens()
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(given)]
    for i, token in enumerate(tokens):
        if len(token) > _LONGEST or not _is_unicode(token):
            model.refuse(f"has a token that is {'too long' if len(token) > _LONGEST else 'not UTF-8'} (number {i})")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        model.refuse("has no tokens" if not tokens else f"has {len(tokens) - len(vocabulary)} tokens twice in tokenizer.ggml.tokens")
    roles = {role: tokens[at] for role, name in _ROLES.items() if (at := model.special_token(name)) is not None}
    try:
        made, begins_with = (_byte_level if kind == "gpt2" else _sentence_piece)(model, vocabulary, types, roles.get("unk_token"))
        # The tokens of a Phi-3 swallow the white space behind them; the file does not say so.
        strips = kind == "llama" and model.architecture == "phi3"
        added = [
            AddedToken(token, special=type_ != USER_DEFINED, normalized=False, rstrip=strips and token not in _PLAIN)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
        made.add_tokens(added)
        _add_frame(made, model, roles, vocabulary, begins_with)
    except ModelLoadError:
        raise
    except Exception as e:  # the library raises nothing more specific
        model.refuse(f"has a tokenizer that can't be made: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    begins = made.encode("", add_special_tokens=True).ids[:1] == [vocabulary[roles["bos_token"]]] if "bos_token" in roles else False
    return made, roles, _templates(model, roles["bos_token"] if begins else None)


def _is_unicode(text: str) -> bool:
    """Bytes that are not UTF-8 were read as lone surrogates."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _byte_level(model: Gguf, vocabulary: dict[str, int], types: list[int], unknown: str | None) -> tuple[tokenizers.Tokenizer, bool]:
    """(tokenizer, whether texts begin with a token for it unless the file says otherwise)"""
    name = model.text("tokenizer.ggml.pre", "default")
    if name not in _WORDS:
        model.refuse(f"cuts texts into words as {name!r:.40} does, which is not supported; supported: {', '.join(sorted(_WORDS))}")
    words = _WORDS[name]
    if "tokenizer.ggml.merges" not in model.fields:
        model.refuse("has no tokenizer.ggml.merges, without which a tokenizer of the kind 'gpt2' has bytes only")
    merges = []
    for merge in model.list_of("tokenizer.ggml.merges", str):
        middle = merge.find(" ", 1)
        if middle < 0:
            model.refuse(f"has the merge {merge!r:.60}, which is not two tokens with a space between them")
        merges.append((merge[:middle], merge[middle + 1 :]))
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in words.expressions),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    return made, words.bos


def _sentence_piece(model: Gguf, vocabulary: dict[str, int], types: list[int], unknown: str | None) -> tuple[tokenizers.Tokenizer, bool]:
    """The same of SentencePiece's BPE: of two neighbours that make a token, those with the highest score are merged first."""
    scores = model.list_of("tokenizer.ggml.scores", float, len(vocabulary))
    if not scores:
        model.refuse("has no tokenizer.ggml.scores, from which a tokenizer of the kind 'llama' merges")
    merges: list[tuple[float, int, tuple[str, str]]] = []
    for token, i in vocabulary.items():
        if types[i] == NORMAL:
            for middle in range(1, len(token)):
                left, right = token[:middle], token[middle:]
                if left in vocabulary and right in vocabulary:
                    merges.append((-scores[i], i, (left, right)))
    merges.sort(key=lambda merge: merge[:2])
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[pair for _, _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = model.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return made, True


def _add_frame(made: tokenizers.Tokenizer, model: Gguf, roles: dict[str, str], vocabulary: dict[str, int], begins: bool) -> None:
    """The tokens that a text begins and ends with."""
    bos = roles.get("bos_token") if model.flag("tokenizer.ggml.add_bos_token", begins) else None
    eos = roles.get("eos_token") if model.flag("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    frame = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    special = [(token, vocabulary[token]) for token in dict.fromkeys((bos, eos)) if token is not None]
    made.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)


def _templates(model: Gguf, bos: str | None) -> dict[str, str]:
    """Name → chat template. bos: what texts begin with, whether a template writes it or not (llama.cpp adds it, so some do not)."""
    found = {}
    for name in ("default", *model.list_of("tokenizer.chat_templates", str)):
        field = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
        template = model.text(field, "")
        if not _is_unicode(template):
            model.refuse(f"has something else than UTF-8 in {field}")
        if template:
            written = bos is None or "bos_token" in template or bos in template
            found[name] = template if written else "{{ bos_token }}" + template
    return found
