"""What the server says of itself: to clients that tokenize, and to routers when they add it."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire import __version__
from quire.server.context import Context, context_of
from quire.server.openai.chunks import json_bytes


def _json(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")


async def tokenizer_info(request: Request) -> Response:
    """The special tokens as text, null where the model has none, and the chat template; vLLM's names."""
    context = context_of(request)
    tokenizer = context.tokenizer
    special = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return _json({
        "tokenizer_class": "PreTrainedTokenizerFast", **special,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": tokenizer.vocab_size, "model_max_length": context.max_model_len, "chat_template": tokenizer.default_chat_template,
    })  # fmt: skip


async def load(request: Request) -> Response:
    """vLLM's name for what runs or waits; counted in sequences."""
    return _json({"server_load": context_of(request).client.in_flight})


def _model(context: Context) -> dict[str, Any]:
    """SGLang's names. A path would say more than a client has to know."""
    return {
        "model_path": context.model, "tokenizer_path": context.model, "served_model_name": context.model, "model_id": context.model,
        "is_generation": True, "max_context_length": context.max_model_len, "has_image_understanding": False,
        "has_audio_understanding": False,
    }  # fmt: skip


async def model_info(request: Request) -> Response:
    return _json(_model(context_of(request)))


async def server_info(request: Request) -> Response:
    context = context_of(request)
    limits = context.client.limits
    return _json(_model(context) | {
        "version": __version__, "tp_size": 1, "dp_size": 1, "status": "draining" if context.client.draining else "ready",
        "max_total_num_tokens": limits.pool_tokens, "max_running_requests": limits.max_num_seqs,
        "page_size": limits.block_size, "kv_block_size": limits.block_size, "max_queued_requests": context.client.max_waiting,
    })  # fmt: skip
