"""Chat templates: what templates may rely on, and what bad messages get."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import pytest

from quire.errors import InvalidRequestError, ModelLoadError
from quire.text import chat
from quire.text.chat import ChatTemplates
from server.scripted import HARMONY, LLAMA3

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
USER = {"role": "user", "content": "<b>Hi</b>"}


def render(template: str, messages: Any = (USER,), generation: bool = True, final: bool = False, **variables: Any) -> str:
    return ChatTemplates({"default": template}, {"bos_token": "<s>"}).render(messages, generation, final, variables)


def test_chatml() -> None:
    assert render(CHATML) == "<|im_start|>user\n<b>Hi</b><|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, generation=False) == "<|im_start|>user\n<b>Hi</b><|im_end|>\n"


def test_what_templates_rely_on() -> None:
    assert render("{{ bos_token }}{{ tools is none }}{{ documents is none }}") == "<s>TrueTrue"
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "<b>Hi</b>"}'
    assert render("{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 1,\n "b": "é"\n}'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c") == "abuserc"
    assert render("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}[{{ x }}]") == "1[]", "with a scope of its own"
    none = {"role": "assistant", "content": "a", "tool_calls": []}
    assert render("{{ messages[0].tool_calls is defined }}", [none]) == "False", "an empty list is none"
    assert render("{% if true %}\n  x\n  {% endif %}") == "  x\n", "trim_blocks and lstrip_blocks"
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"


def test_the_templates_own_errors_are_shown() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="does not accept this conversation"):
        render("{{ messages[0].absent.deeper }}")
    with pytest.raises(InvalidRequestError, match="does not accept this conversation"):
        render("{{ 1 / 0 }}")
    with pytest.raises(ModelLoadError, match="template is not valid"):
        render("{% if %}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ range(1000000000) | list | length }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_holds(attack: str) -> None:
    with pytest.raises(InvalidRequestError):
        render(attack)


def test_a_huge_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(InvalidRequestError, match="more than 1,000 characters"):
        render("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}")


@pytest.mark.parametrize(
    "messages", ["hi", {}, [], ["hi"], [{"content": "x"}], [{"role": "robot", "content": "x"}], [{"role": "user"}], None]
)
def test_bad_messages(messages: Any) -> None:
    with pytest.raises(InvalidRequestError):
        render(CHATML, messages)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (5, "must be a string or a list of parts"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], "'image_url': this model reads text only"),
        ([{"type": "text"}], r"\[0\] has no text: it must be a string"),
        (object(), "only JSON values"),
    ],
)
def test_bad_content(content: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        render(CHATML, [{"role": "user", "content": content}])


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"


def test_developer_is_system_unless_the_template_knows_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", messages) == "system"
    assert render("{# developer #}{{ messages[0].role }}", messages) == "developer"


def test_tool_calls_and_reasoning() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2]}'}}
    message = {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]}
    template = "{{ messages[0].tool_calls[0].function.arguments.x[1] }}{{ 'a' + messages[0].content }}{{ messages[0].reasoning_content }}"
    assert render(template, [message]) == "2ahm", "no content beside the calls is an empty text, which templates can add to others"
    assert call["function"]["arguments"] == '{"x": [1, 2]}', "the caller's messages stay as they are"
    for text in ('{"x": ', "[" * 100_000, '{"x": %s}' % ("9" * 5_000)):
        call["function"]["arguments"] = text
        shown = render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", [message])
        assert shown == json.dumps(text), "a model sees what it wrote"


HI = "<|start|>user<|message|>Hi<|end|>"
CALLED = '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": "ü"}<|call|>'
RESULT = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>{}<|end|>"


def thought(text: str) -> str:
    return f"<|start|>assistant<|channel|>analysis<|message|>{text}<|end|>"


def final(text: str) -> str:
    return f"<|start|>assistant<|channel|>final<|message|>{text}<|end|>"


def harmony(messages: list[Any], **variables: Any) -> str:
    """A conversation in gpt-oss's format, without the system message."""
    return render(HARMONY, messages, **variables).partition("<|end|>")[2].removesuffix("<|start|>assistant")


def test_what_the_template_of_gpt_oss_relies_on() -> None:
    user = {"role": "user", "content": "Hi"}
    system = render(HARMONY, [user], builtin_tools=["python"], model_identity="You are Q.", reasoning_effort="high")
    year = datetime.now().year
    assert system == f"<|start|>system<|message|>You are Q.\nDate: {year}\nReasoning: high\nBuilt in: python\n<|end|>{HI}<|start|>assistant"
    assert "You are a model.\n" in render(HARMONY, [user])
    for role in ("developer", "system"):
        said = harmony([{"role": role, "content": "Be brief."}, user], tools=[{"type": "function", "function": {"name": "f"}}])
        assert said == '<|start|>developer<|message|>Be brief.\n{"name": "f"}<|end|>' + HI


def test_histories_of_gpt_oss_lose_nothing() -> None:
    user, call = {"role": "user", "content": "Hi"}, {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "ü"}'}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "31"}
    for key in ("reasoning_content", "reasoning", "thinking"):
        said = thought("Hm.") + CALLED + RESULT.format('"31"')
        assert harmony([user, calls | {key: "Hm."}, result]) == HI + said
        assert harmony([user, calls | {key: "Hm.", "content": "I look."}, result]) == HI + said.replace("Hm.", "Hm.\n\nI look.")
        assert harmony([user, {"role": "assistant", "content": None, key: "cut off"}, user]) == HI + final("") + HI
    assert harmony([user, calls, result]) == HI + CALLED + RESULT.format('"31"')
    second = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    both = calls | {"tool_calls": [call, second], "reasoning": "Hm."}
    g = (CALLED + RESULT).replace(".f", ".g").replace('{"x": "ü"}', "{{}}")
    expected = HI + thought("Hm.") + CALLED + RESULT.format('"31"') + g.format('"32"')
    other = {"role": "tool", "tool_call_id": "2", "content": "32"}
    assert harmony([user, both, result, other]) == harmony([user, both, other, result]) == expected
    stray = {"role": "tool", "tool_call_id": "3", "content": "33"}
    assert '"33"' in harmony([user, both, stray, result]), "whatever it is the result of"
    messages = [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, user, {"role": "system", "content": "C"}]
    assert harmony(messages) == "<|start|>developer<|message|>A\nB<|end|>" + HI.replace("Hi", "Hi\n<system>\nC\n</system>")
    assert harmony([user, user]) == HI + HI


def test_templates_that_take_one_call_get_each_with_its_result() -> None:
    template = LLAMA3 + "{# This model only supports single tool-calls at once! #}"
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in "gf"]
    text = render(template, [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results])
    assert re.findall(r'"name": "\w"|of \w', text) == ['"name": "f"', "of f", '"name": "g"', "of g"]


def test_a_refusal_stands_for_content_that_is_null() -> None:
    template = "{{ messages[0].content }}"
    assert render(template, [{"role": "assistant", "content": None, "refusal": "I will not."}]) == "I will not."
    assert render(template, [{"role": "assistant", "content": "Yes.", "refusal": None}]) == "Yes."
    with pytest.raises(InvalidRequestError, match="content is missing"):
        render(template, [{"role": "user", "refusal": "I will not."}])


@pytest.mark.parametrize("levels", [chat.MAX_DEPTH, 600, 10_000])
def test_deep_nesting_is_refused(levels: int) -> None:
    deep: Any = "x"
    for _ in range(levels):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested more than 100 levels deep"):
        render("{{ messages[0].more | tojson }}", [{**USER, "more": deep}])
    with pytest.raises(InvalidRequestError, match="nested more than 100 levels deep"):
        render("{{ more | tojson }}", more=deep)


def test_usual_nesting_is_not() -> None:
    deep: Any = "x"
    for _ in range(chat.MAX_DEPTH - 2):
        deep = [deep]
    assert render("{{ messages[0].more | tojson }}", [{**USER, "more": deep}]).count("[") == chat.MAX_DEPTH - 2


def test_continue_final_message() -> None:
    messages = [USER, {"role": "assistant", "content": "Once upon "}]
    expected = "<|im_start|>user\n<b>Hi</b><|im_end|>\n<|im_start|>assistant\nOnce upon"
    assert render(CHATML, messages, generation=False, final=True) == expected + " "
    trimming = CHATML.replace("message.content +", "message.content | trim +")
    assert render(trimming, messages, generation=False, final=True) == expected
    with pytest.raises(InvalidRequestError, match="at most one"):
        render(CHATML, messages, generation=True, final=True)
    with pytest.raises(InvalidRequestError, match="leaves out"):
        render("{{ messages[0].content }}", messages, generation=False, final=True)
    with pytest.raises(InvalidRequestError, match="needs text"):
        render(CHATML, [{"role": "assistant"}], generation=False, final=True)


ALTERNATING = """{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}
{%- if not loop.first and m.role == loop.previtem.role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if fails %}{{ raise_exception('never') }}{% endif %}[{{ m.role }}]{{ m.content }}
{%- endfor %}"""


def said(*turns: str) -> list[dict[str, str]]:
    """ "user: hello" → a message."""
    return [{"role": role, "content": content} for role, _, content in (turn.partition(": ") for turn in turns)]


@pytest.mark.parametrize(("turns", "prompt"), [
    (["system: a", "user: b", "assistant: c", "user: d"], "[system]a[user]b[assistant]c[user]d"),
    (["system: a", "system: b", "user: c"], "[system]a\nb[user]c"),
    (["user: a", "user: b", "assistant: c"], "[user]a\nb[assistant]c"),
    (["system: a", "user: b", "developer: c", "user: d"], "[system]a[user]b\n<system>\nc\n</system>\nd"),
    (["user: a", "assistant: b", "tool: c", "system: d", "assistant: e"], "[user]a[assistant]b[tool]c\n<system>\nd\n</system>[assistant]e"),
    (["user: a", "assistant: b", "system: c"], "[user]a[assistant]b[user]<system>\nc\n</system>"),
])  # fmt: skip
def test_templates_that_insist_on_turns_are_given_turns(turns: list[str], prompt: str) -> None:
    assert render(ALTERNATING, said(*turns)) == prompt


def test_a_template_that_takes_a_conversation_as_it_is_is_given_it() -> None:
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert render(plain, said("user: a", "system: b", "user: c", "user: d")) == "[user]a[system]b[user]c[user]d"


def test_what_a_template_says_first_is_told() -> None:
    with pytest.raises(InvalidRequestError, match="must be at the beginning"):
        render(ALTERNATING.replace("{%- if fails", "{%- if '</system>' in m.content"), said("user: a", "system: b"))
    with pytest.raises(InvalidRequestError, match="never"):
        render(ALTERNATING, said("user: a"), fails=True)
