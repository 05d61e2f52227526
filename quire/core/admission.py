"""What a request must satisfy before it enters the engine, and the policies that let a waiting sequence into the pool."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from quire.core.block_manager import BlockManager
from quire.core.sequence import Sequence
from quire.errors import ContextLengthError, InvalidRequestError
from quire.sampling_params import SamplingParams


def empty_prompt() -> InvalidRequestError:
    """For a prompt without tokens, and for an empty text, also where the tokenizer would put a token before it."""
    return InvalidRequestError("the prompt is empty: it must hold at least one token", param="prompt")


@dataclass(slots=True, frozen=True)
class RequestLimits:
    """What every request of an engine is checked against, before any work is done for it."""

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    num_blocks: int
    block_size: int

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises InvalidRequestError or ContextLengthError with the numbers and the remedy."""
        prompt, context = len(prompt_token_ids), self.max_model_len
        if prompt == 0:
            raise empty_prompt()
        for token in prompt_token_ids:
            if not 0 <= token < self.vocab_size:
                raise InvalidRequestError(
                    f"prompt token id {token} is out of range: the vocabulary has ids 0 to {self.vocab_size - 1}", param="prompt"
                )
        if prompt >= context:
            raise ContextLengthError(
                f"the prompt has {prompt:,} tokens, but the context is {context:,}, output included: shorten the prompt to at most "
                f"{context - 1:,} tokens, or serve with a longer --max-model-len if the model allows it",
                param="prompt",
            )
        room = context - prompt
        if params.max_tokens is not None and params.max_tokens > room:
            raise ContextLengthError(
                f"prompt {prompt:,} + max_tokens {params.max_tokens:,} > context {context:,}: lower max_tokens to at most {room:,}, "
                "or serve with a longer --max-model-len if the model allows it",
                param="max_tokens",
            )
        if params.min_tokens > room:
            raise ContextLengthError(
                f"prompt {prompt:,} + min_tokens {params.min_tokens:,} > context {context:,}: lower min_tokens to at most {room:,}",
                param="min_tokens",
            )
        for name, ids in (("stop_token_ids", params.stop_token_ids or ()), ("logit_bias", params.logit_bias or ())):
            for token in ids:
                if token >= self.vocab_size:
                    raise InvalidRequestError(
                        f"{name}: token id {token} is out of range: the vocabulary has ids 0 to {self.vocab_size - 1}", param=name
                    )
        if params.use_beam_search:
            self._check_beams(prompt, params.num_beams, self.max_tokens(prompt_token_ids, params))

    def max_tokens(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """Tokens that a checked request may generate for each sequence."""
        room = self.max_model_len - len(prompt_token_ids)
        return room if params.max_tokens is None else params.max_tokens

    def _check_beams(self, prompt: int, width: int, max_tokens: int) -> None:
        """All beams must be able to run at the same time, with nothing shared but the prompt."""
        shared = prompt // self.block_size
        need = shared + width * (-(-(prompt + max_tokens) // self.block_size) - shared)
        if width > self.max_num_seqs:
            raise InvalidRequestError(
                f"{width} beams > --max-num-seqs {self.max_num_seqs}: beams run together; lower beam_width, or serve with more sequences",
                param="beam_width",
            )
        if need > self.num_blocks:
            raise InvalidRequestError(
                f"{width} beams of up to {prompt + max_tokens:,} tokens may need {need:,} KV blocks of {self.block_size}, but the pool has "
                f"{self.num_blocks:,}: lower beam_width or max_tokens, or serve with more --kv-memory",
                param="beam_width",
            )


class AdmissionPolicy(Protocol):
    """Decides whether a waiting sequence may start. It must let any sequence in that fits when nothing is running."""

    def admits(self, running: Seq[Sequence], seq: Sequence, need: int, room: int, manager: BlockManager) -> bool:
        """need: free blocks that ``seq`` takes to compute its known tokens; room: free blocks that nobody has a claim on."""
        ...

    def ended(self, generated: int) -> None:
        """A sequence has come to its end with ``generated`` tokens."""
        ...


class Watermark:
    """Admit what fits, and keep 1 % of the pool free so that running sequences can grow without preempting at once."""

    def admits(self, running: Seq[Sequence], seq: Sequence, need: int, room: int, manager: BlockManager) -> bool:
        return need + (manager.pool.num_blocks // 100 if running else 0) <= room

    def ended(self, generated: int) -> None:
        pass
