"""A backend that says what it is told to, and tokenizers with the chat templates of models that call tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers

from core.fake_backend import Row
from quire.core.plan import StepResult, accepted
from quire.outputs import TokenLogprobs
from quire.text.tokenizer import Tokenizer
from quire.text.tools import formats
from server.harness import EMBEDDED, PacedBackend, Server

ENDS = {"harmony": ("<|return|>", "<|call|>")}
"""Template → what ends an answer; of others, ``<|end|>``."""

HERMES = """{%- if tools %}<|sys|>Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.{% endif %}
{%- for message in messages %}<|{{ message.role }}|>
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

THINKING = HERMES + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% elif deep %}<think>\n{% endif %}"

LLAMA3 = """{%- if tools %}<|start_header_id|>{{ tools | tojson }}{% endif %}
{%- for message in messages %}<|start_header_id|>{{ message.role }}|
{%- if message.tool_calls %}
    {%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{"name": "{{ message.tool_calls[0].function.name }}", "parameters": {{ message.tool_calls[0].function.arguments | tojson }}}
{%- else %}{{ message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant|{% endif %}"""

MISTRAL = """{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}[TOOL_CALLS][
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
            {{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}
        {%- endfor %}]
    {%- elif message.role == 'tool' %}[TOOL_RESULTS]{"id": "{{ message.tool_call_id }}", "content": {{ message.content }}}
    {%- else %}[INST]{{ message.content }}[/INST]
    {%- endif %}
{%- endfor %}"""

HARMONY = """{%- macro system() %}
    {%- if model_identity is not defined %}{% set model_identity = "You are a model." %}{% endif %}
    {{- model_identity + "\\n" }}
    {%- if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif %}
    {{- "Date: " + strftime_now("%Y") + "\\nReasoning: " + reasoning_effort + "\\n" }}
    {%- for tool in builtin_tools or [] %}{{ "Built in: " + tool + "\\n" }}{% endfor %}
{%- endmacro %}
{{- "<|start|>system<|message|>" }}{{ system() }}{{ "<|end|>" }}
{%- set rest = messages %}
{%- set instructions = "" %}
{%- if messages[0].role in ("developer", "system") %}{% set rest = messages[1:] %}{% set instructions = messages[0].content %}{% endif %}
{%- if instructions or tools %}{{ "<|start|>developer<|message|>" + instructions }}
    {%- for tool in tools or [] %}{{ "\\n" + tool.function | tojson }}{% endfor %}{{ "<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in rest %}
    {%- if message.role == "assistant" and "tool_calls" in message %}
        {#- We assume max 1 tool call per message #}
        {%- if message.content and message.thinking %}{{ raise_exception("not both content and thinking") }}{% endif %}
        {%- if message.content or message.thinking %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + (message.content or message.thinking) + "<|end|>" }}
        {%- endif %}
        {%- set last.name = message.tool_calls[0].function.name %}
        {{- "<|start|>assistant to=functions." + last.name + "<|channel|>commentary json<|message|>" }}
        {{- message.tool_calls[0].function.arguments | tojson }}{{ "<|call|>" }}
    {%- elif message.role == "assistant" %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + ("<|end|>" if not loop.last else "<|return|>") }}
    {%- elif message.role == "tool" %}
        {%- if last.name is none %}{{ raise_exception("a result of nothing") }}{% endif %}
        {{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" + message.content | tojson + "<|end|>" }}
    {%- elif message.role == "user" %}{{ "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}"""
"""What gpt-oss's own does, and what it refuses and passes over, without its words."""

TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "thinking": THINKING, "harmony": HARMONY}
SPECIAL = ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|end|>"]
ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


def chat_tokenizer(template: str, template_end: str = "") -> Tokenizer:
    """The embedded model's tokenizer with a template of TEMPLATES, and with markers as tokens: special, as in real vocabularies, where
    they are so there."""
    tokenizer = tokenizers.Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in ADDED])
    if template == "harmony":
        tokenizer.add_special_tokens(list(formats.HARMONY))
    return Tokenizer(tokenizer, chat_templates=TEMPLATES[template] + template_end)


class ScriptedBackend(PacedBackend):
    """Every sequence says ``says``, then ends; but what has a form to follow is made up, as PacedBackend does it."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[str]) -> None:
        super().__init__(num_blocks=512, max_model_len=4096, vocab_size=tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self.ends = tuple(map(self.token, ends))
        """Tokens that end a text."""
        self.script = [self.end]
        self.prompt = ""
        """Of the last sequence that was started."""

    @property
    def end(self) -> int:
        """The one with which it ends."""
        return self.ends[0]

    def token(self, text: str) -> int:
        """The id of an added token."""
        token = self._tokenizer.token_id(text)
        assert token is not None
        return token

    @property
    def says(self) -> str:
        return self._tokenizer.decode(self.script[:-1], skip_special_tokens=False)

    @says.setter
    def says(self, text: str) -> None:
        self.script = [*self._tokenizer.encode(text, add_special_tokens=False), self.end]

    def _sample(self, row: Row, number: int, draft: Sequence[int], masks: Sequence[bytes], result: StepResult) -> None:
        if masks:
            super()._sample(row, number, draft, masks, result)
            return
        prompt, script = row.start.num_prompt, self.script
        if len(row.tokens) == prompt:
            self.prompt = self._tokenizer.decode(row.tokens, skip_special_tokens=False)
        said = len(row.tokens) - prompt
        tokens = [script[min(i, len(script) - 1)] for i in range(said, said + 1 + len(draft))]
        row.tokens += tokens[: accepted(draft, tokens)]
        result.tokens += tokens
        result.logprobs += [TokenLogprobs((-1.0, 1), []) if row.start.params.logprobs is not None else None for _ in tokens]


def serve_scripted(template: str, *, template_end: str = "", **options: Any) -> Server:
    """A server of a model that says what ``server.backend.says`` is; see chat_tokenizer and Server."""
    tokenizer = chat_tokenizer(template, template_end)
    backend = ScriptedBackend(tokenizer, ENDS.get(template, (formats.END,)))
    return Server(tokenizer, backend, eos=backend.ends, **options)
