"""What a request must satisfy before it enters the engine. Admission to a step is the scheduler's work."""

from __future__ import annotations

from dataclasses import dataclass

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

    def max_tokens(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """Tokens that a checked request may generate for each sequence."""
        room = self.max_model_len - len(prompt_token_ids)
        return room if params.max_tokens is None else params.max_tokens
