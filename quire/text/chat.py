"""Chat templates: messages → the prompt of a model, in a sandbox.

A template is data that came with a model: Jinja in an immutable sandbox, with the globals and filters that templates are
written for (those of transformers' ``apply_chat_template``), and plain JSON values to look at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequestError, ModelLoadError
from quire.text.tools.formats import detect, takes_one_call

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""A message as in the OpenAI API: ``role``, ``content`` (a string, or a list of ``{"type": "text", "text": ...}``), ..."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a message that are text."""
ROLES = ("developer", "system", "user", "assistant", "tool")
MAX_RENDERED_CHARS = 16 << 20
"""A template must not turn a small request into a huge prompt."""

MAX_DEPTH = 100
"""Levels of lists and objects in a message or in a template's variables; Python's own limit is met soon after."""

_SYSTEM = ("system", "developer")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CONTINUE_HERE = "\x02continue\x03 "
"""Marks the end of the last message while it is rendered; ends in a space, to see whether the template trims."""


class _RefusedError(InvalidRequestError):
    """A template does not accept a conversation."""


class ChatTemplates:
    """The chat templates of a model: ``default``, and perhaps others such as ``tool_use``. Compiled at first use."""

    __slots__ = ("_compiled", "_sources", "_variables")

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """sources: name → template, at least one. variables: special tokens that templates refer to (``bos_token`` ...)."""
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def source(self) -> str:
        """All templates, to look for words in them."""
        return "\n".join(self._sources.values())

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, continue_final_message: bool,
               variables: Mapping[str, Any], plain: Callable[[Any], Any] | None = None) -> str:  # fmt: skip
        """The prompt. plain: what is done to all that is not the template's own.

        Where the template refuses the conversation, it is asked again with system messages at the beginning only and no two users'
        messages in a row: clients send both, and many templates know neither.

        Raises InvalidRequestError (messages, or the template for them), ModelLoadError (syntax of the template)."""
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message continues the last message and add_generation_prompt begins a new one: set at most one of them",
                param="continue_final_message",
            )
        name = self._choose(variables)
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise InvalidRequestError(f"messages must be a list of at least one message, got {messages!r:.60}", param="messages")
        chat = _fitted([_message(i, m, self._sources[name]) for i, m in enumerate(messages)], self._sources[name])
        more = _plain(variables, "chat_template_kwargs")
        if plain is not None:
            more = plain(more)
        if continue_final_message and not isinstance(chat[-1].get("content"), str):
            raise InvalidRequestError("continue_final_message needs text content in the last message", param="continue_final_message")
        if continue_final_message and chat[-1].get("tool_calls"):
            raise InvalidRequestError(
                "continue_final_message continues a text, and the last message has tool_calls: leave them out, or send their results",
                param="continue_final_message",
            )
        known = {"tools": None, "documents": None, **self._variables, **more, "add_generation_prompt": add_generation_prompt}

        def prompt(chat: list[dict[str, Any]]) -> str:
            if plain is not None:
                chat = plain(chat)
            if continue_final_message:
                chat = [*chat[:-1], chat[-1] | {"content": chat[-1]["content"] + _CONTINUE_HERE}]
            text = self._render(name, {**known, "messages": chat})
            return _cut(text) if continue_final_message else text

        try:
            return prompt(chat)
        except _RefusedError as refused:
            plainer = _in_turns(chat)
            if plainer == chat:
                raise
            try:
                return prompt(plainer)
            except _RefusedError:
                raise refused from None

    @property
    def default(self) -> str:
        """The source of the template that is used where there is nothing special."""
        return self._sources[self._choose({})]

    def _choose(self, variables: Mapping[str, Any]) -> str:
        if variables.get("tools") and "tool_use" in self._sources:
            return "tool_use"
        return "default" if "default" in self._sources else next(iter(self._sources))

    def _render(self, name: str, variables: Mapping[str, Any]) -> str:
        import jinja2

        template = self._compiled.get(name)
        if template is None:
            try:
                template = self._compiled[name] = _environment().from_string(self._sources[name])
            except jinja2.TemplateError as e:
                raise ModelLoadError(f"the model's chat template is not valid: {e}") from None
        parts, size = [], 0
        try:
            for part in template.generate(variables):
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise InvalidRequestError(
                        f"the chat template makes a prompt of more than {MAX_RENDERED_CHARS:,} characters", param="messages"
                    )
                parts.append(part)
        except InvalidRequestError:
            raise
        except Exception as e:  # a template is a program: it can fail in any way
            raise _RefusedError(f"the model's chat template does not accept this conversation: {e}", param="messages") from None
        return "".join(parts)


def _cut(text: str) -> str:
    """The prompt up to the end of the last message."""
    mark = _CONTINUE_HERE.strip()
    at = text.rfind(mark)
    if at < 0:
        raise InvalidRequestError(
            "the model's chat template leaves out the content of the last message, so it can't be continued: send it without "
            "continue_final_message",
            param="continue_final_message",
        )
    kept = text[:at]
    # Where the template trims messages it has trimmed the mark's own space, and would have trimmed what stands before it.
    return kept if text.startswith(_CONTINUE_HERE, at) else kept.rstrip()


def _message(index: int, message: object, template: str) -> dict[str, Any]:
    """A checked copy of a message, in the form that templates are written for."""
    at = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{at} must be an object with role and content, got {message!r:.60}", param=at)
    # Templates handle an absent key; a null they would spell out as "None".
    made: dict[str, Any] = {k: v for k, v in _plain(message, at).items() if v is not None}
    role = made.get("role")
    if role not in ROLES:
        raise InvalidRequestError(f"{at}.role must be one of {', '.join(ROLES)}; got {role!r:.60}", param=f"{at}.role")
    if role == "developer" and "developer" not in template:
        made["role"] = "system"  # the newer name of the same role; most templates know only the older one
    if role == "assistant" and isinstance(refusal := made.get("refusal"), str):
        made.setdefault("content", refusal)  # the API has it beside a content of null
    if "content" in made:
        made["content"] = _content(f"{at}.content", made["content"])
    elif role != "assistant":
        raise InvalidRequestError(f"{at}.content is missing", param=f"{at}.content")
    if reasoning := next((made[key] for key in _REASONING if made.get(key)), None):
        made["reasoning_content"] = reasoning
        made.setdefault("thinking", reasoning)
    if not made.get("tool_calls"):
        made.pop("tool_calls", None)  # some servers send an empty list, and templates look whether there is one
    if calls := made.get("tool_calls"):
        made["tool_calls"] = _tool_calls(f"{at}.tool_calls", calls)
    if calls or reasoning:
        made.setdefault("content", "")  # there are templates that add it to other text
    return made


def _fitted(chat: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """The same conversation for a template that would pass over a part of it, or has another place for it."""
    if takes_one_call(template):
        chat = _one_call_each(chat)
    if detect(template) != "harmony":
        return chat
    if any(message["role"] in _SYSTEM for message in chat[1:]):
        chat = _in_turns(chat)
    return [_with_one_text(message) if message.get("tool_calls") else message for message in chat]


def _one_call_each(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call in a message of its own, and its result behind it."""
    made: list[dict[str, Any]] = []
    left = chat[::-1]
    while left:
        message = left.pop()
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            made.append(message)
            continue
        results = []
        while left and left[-1]["role"] == "tool":
            results.append(left.pop())
        for call in calls:
            made.append(message | {"tool_calls": [call]})
            made += [result for result in results if result.get("tool_call_id") == call.get("id")]
            message = {"role": message["role"], "content": ""}
        known = [call.get("id") for call in calls]
        made += [result for result in results if result.get("tool_call_id") not in known]
    return made


def _with_one_text(message: dict[str, Any]) -> dict[str, Any]:
    """gpt-oss says what it does, and why, in the same channel before it calls: the template takes one or the other."""
    if not (message.get("content") and message.get("thinking")):
        return message
    return message | {"content": "", "thinking": f"{message['thinking']}\n\n{message['content']}"}


def _in_turns(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with one system message at most, the first, and with a user's messages in a row as one.

    A later system message becomes part of what the user says, or of the tool's result before it.
    """
    made: list[dict[str, Any]] = []
    for message in chat:
        role, content = message["role"], message.get("content")
        before = made[-1]["role"] if made else None
        if role in _SYSTEM and before is not None and before not in _SYSTEM:
            role, content = "user", f"<system>\n{content}\n</system>"
            joins = before in ("user", "tool")
        else:
            joins = role == before == "user" or (role in _SYSTEM and before is not None)
        if joins:
            made[-1] = made[-1] | {"content": f"{made[-1]['content']}\n{content}"}
        else:
            made.append(message | {"role": role, "content": content} if role != message["role"] else message)
    return made


def text_of(content: Any) -> str:
    """The text of a message's content; none where there is no content. Raises InvalidRequestError."""
    return "" if content is None else _content("content", content)


def _content(at: str, content: Any) -> str:
    """The text of a message's content; text parts are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{at} must be a string or a list of parts, got {content!r:.60}", param=at)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif kind in TEXT_PARTS:
            raise InvalidRequestError(f"{at}[{i}] has no text: it must be a string", param=at)
        else:
            raise InvalidRequestError(
                f"{at}[{i}] has type {kind!r:.60}: this model reads text only, so parts must be of type 'text'", param=at
            )
    return "\n".join(texts)


def _tool_calls(at: str, calls: Any) -> list[Any]:
    """Tool calls with their arguments as objects: the API has them as JSON text, templates want to walk them.

    What is not JSON stays as it is: a model wrote it, and has to see what the tool's result speaks of.
    """
    if not isinstance(calls, list):
        raise InvalidRequestError(f"{at} must be a list, got {calls!r:.60}", param=at)
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise InvalidRequestError(f"{at}[{i}].function must be an object", param=at)
        if isinstance(arguments := function.get("arguments"), str):
            with suppress(ValueError, RecursionError):
                function["arguments"] = _plain(json.loads(arguments or "{}"), f"{at}[{i}].function.arguments")
    return calls


def _plain(value: Any, at: str, depth: int = 0) -> Any:
    """A copy made of plain JSON types, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth == MAX_DEPTH:
        raise InvalidRequestError(f"{at} is nested more than {MAX_DEPTH} levels deep", param=at)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, at, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, at, depth + 1) for v in value]
    raise InvalidRequestError(f"{at} holds a {type(value).__name__}: only JSON values are allowed", param=at)


@cache
def _environment() -> jinja2.Environment:
    """The sandbox, made at first use: Jinja takes a while to import."""
    from datetime import datetime

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; its content is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        """Jinja's own filter escapes HTML, and a prompt is not HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
