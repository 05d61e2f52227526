"""Small tokenizers of the kinds that models bring, built on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "Paged memory holds tokens instead of reservations;  blocks are handed out on demand.\n",
    "größer, naïve, 你好世界, 🙂🙃 and some more words: 1234567890 + 42 = ?\n\n",
    "def f(x):\n    return x  # a comment\n",
] * 4


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2, Llama 3, Qwen: byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("two words", normalized=False)])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """Unigram pieces with a mark for spaces (XGLM, T5)."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama(strip: bool = True) -> tokenizers.Tokenizer:
    """Llama 2, Mistral (with ``strip``), Gemma (without): sentencepiece BPE where unknown characters become byte tokens."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzTPD.,:;0123456789ö\n"]
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁"), ("▁", "a"), ("o", "n"), ("e", "r"), ("▁", "b"), ("▁", "s")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *(a + b for a, b in pairs)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if strip else replace
    tail = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def gemma() -> tokenizers.Tokenizer:
    return llama(strip=False)


def words() -> tokenizers.Tokenizer:
    """Whole words, and no decoder at all."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "drei": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[END]"])
    return tokenizer


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "llama": llama, "gemma": gemma, "words": words}


@cache
def sample(kind: str) -> tokenizers.Tokenizer:
    """One of KINDS, made once."""
    return KINDS[kind]()


def write_folder(folder: Path, kind: str, config: dict[str, object] | None = None) -> Path:
    """tokenizer.json and tokenizer_config.json, as in a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
