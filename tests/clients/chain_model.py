"""A checkpoint that says what it is told to: each token of a text is followed by the next one, whatever came before.

Attention and feed-forward are zero, embeddings of the texts' tokens are one-hot, and lm_head is what follows. The chat template picks the
text: the prompt ends with its marker. The tokens of the texts are unlike those that a prompt is encoded to, which all mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from sample_models import LLAMA, write_model
from server.harness import EMBEDDED

END = "<|end|>"


def marker(name: str) -> str:
    """With which a prompt ends that is answered with the text ``name``."""
    return f"<|say {name}|>"


def write_chain_model(folder: Path, texts: Mapping[str, str], template: str, context: int) -> Path:
    """texts: name → what is said after its marker. template: a chat template, which may write markers. context: tokens."""
    tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    special = [END, *map(marker, texts)]
    chains = [[marker(name), *_pieces(text, vocab), END] for name, text in texts.items()]
    ids = {text: len(vocab) + i for i, text in enumerate(special)}
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": id, "content": text, **fields} for text, id in ids.items()]
    ids |= vocab
    states = {token: i for i, token in enumerate(token for chain in chains for token in chain[:-1])}
    hidden = -(-len(states) // 64) * 64
    embed, head = np.zeros((2, len(ids), hidden), np.float32)
    for chain in chains:
        for token, after in pairwise(chain):
            embed[ids[token], states[token]] = 1
            head[ids[after], states[token]] = 100
    config = LLAMA | {
        "vocab_size": len(ids), "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 64, "intermediate_size": 64, "max_position_embeddings": context, "torch_dtype": "float32", "bos_token_id": None,
        "eos_token_id": ids[END],
    }  # fmt: skip
    layer = {
        "self_attn.q_proj": (64, hidden), "self_attn.k_proj": (64, hidden), "self_attn.v_proj": (64, hidden),
        "self_attn.o_proj": (hidden, 64), "mlp.gate_proj": (64, hidden), "mlp.up_proj": (64, hidden), "mlp.down_proj": (hidden, 64),
    }  # fmt: skip
    tensors = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in layer.items()}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    tensors |= {f"model.{name}.weight": np.ones(hidden, np.float32) for name in norms}
    tensors |= {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    write_model(folder, config, tensors)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def _pieces(text: str, vocab: dict[str, int]) -> list[str]:
    """Of a text, each with a token of its own, which is added and which no merge makes."""
    letters = "".join(piece for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))
    pieces = [""]
    for letter in letters:
        if len(pieces[-1]) >= 4 and pieces[-1] not in vocab:
            vocab[pieces[-1]] = len(vocab)
            pieces.append("")
        pieces[-1] += letter
    while pieces[-1] in vocab:  # the last one has nothing to grow into but the one before it
        last = pieces.pop()
        pieces[-1] += last
    vocab[pieces[-1]] = len(vocab)
    return pieces
