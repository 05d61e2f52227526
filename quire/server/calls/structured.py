"""The form that a request wants its output to have: OpenAI's response_format, vLLM's structured_outputs and guided_*."""

from __future__ import annotations

from typing import Any

from quire.errors import InvalidRequestError
from quire.server.calls.fields import shown
from quire.server.calls.schemas import GenerationRequest
from quire.structured import Structured

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_OPTIONS = ("disable_any_whitespace", "whitespace_pattern")
_NOTHING = {"disable_fallback": (True, False), "disable_additional_properties": (False,), "structural_tag": (), "backend": None}
"""More fields of structured_outputs → values that ask for nothing, besides null; None: all."""


def structured_of(body: GenerationRequest) -> Structured | None:
    """Raises InvalidRequestError, which names the field."""
    found = {name: value for name in _GUIDED if (value := getattr(body, name)) is not None}
    made = []
    for name, value in found.items():
        made.append(_structured(_GUIDED[name], value, name, whitespace=body.guided_whitespace_pattern))
    if body.structured_outputs is not None:
        made.append(_structured_outputs(body.structured_outputs))
    if body.response_format is not None and (form := _response_format(body.response_format)) is not None:
        made.append(form)
    if len(made) > 1:
        names = " and ".join(form.source for form in made[:2])
        raise InvalidRequestError(f"{names} both say what the output must be: leave one of them out", param=made[1].source)
    if body.guided_whitespace_pattern is not None and body.guided_json is None:
        raise InvalidRequestError("guided_whitespace_pattern needs guided_json", param="guided_whitespace_pattern")
    return made[0] if made else None


def _response_format(value: dict[str, Any]) -> Structured | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's servers take one here
        return _structured("json_object" if schema is None else "json", True if schema is None else schema, "response_format")
    if kind == "json_schema":
        wanted = value.get("json_schema")
        source = "response_format.json_schema"
        if not isinstance(wanted, dict):
            raise InvalidRequestError(f"{source} must be an object with a name and a schema, got {shown(wanted)}", param=source)
        source += ".schema"
        schema = wanted.get("schema")
        if schema is None:
            raise InvalidRequestError(f"{source} is required", param=source)
        return _structured("json", schema, source)
    raise InvalidRequestError(
        f"response_format.type must be text, json_object or json_schema, got {shown(kind)}", param="response_format.type"
    )


def _structured_outputs(value: dict[str, Any]) -> Structured:
    field = "structured_outputs"
    given = {name: entry for name, entry in value.items() if entry is not None}
    for name, entry in given.items():
        if name not in (*_KINDS, *_OPTIONS, *_NOTHING):
            raise InvalidRequestError(f"{field} has the unknown field {name[:80]!r}; known are {', '.join(_KINDS)}", param=field)
        nothing = _NOTHING.get(name)
        if nothing is not None and entry not in nothing:
            raise InvalidRequestError(f"{field}.{name} is not supported by this server: leave it out", param=f"{field}.{name}")
    kinds = [name for name in _KINDS if name in given and not (name == "json_object" and given[name] is False)]
    if len(kinds) != 1:
        raise InvalidRequestError(f"{field} must have exactly one of {', '.join(_KINDS)}, got {', '.join(kinds) or 'none'}", param=field)
    compact, whitespace = given.get("disable_any_whitespace", False), given.get("whitespace_pattern")
    if not isinstance(compact, bool):
        raise InvalidRequestError(f"{field}.disable_any_whitespace must be true or false, got {shown(compact)}", param=field)
    if compact:
        whitespace = ""
    return _structured(kinds[0], given[kinds[0]], f"{field}.{kinds[0]}", whitespace=whitespace)


def _structured(kind: str, value: Any, source: str, *, whitespace: Any = None) -> Structured:
    if kind == "json":
        return Structured.json(value, whitespace=whitespace, source=source)
    if kind == "json_object":
        if value is not True:
            raise InvalidRequestError(f"{source} must be true, got {shown(value)}", param=source)
        return Structured.json_object(whitespace=whitespace, source=source)
    if kind == "choice":
        return Structured.choice(value, source=source)
    return Structured(kind, value, None, source)
