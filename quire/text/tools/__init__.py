"""Tools: from the text that a model writes to calls of functions."""

from quire.text.tools.delta import Call, CallDelta, Message, MessageDelta, Prose, ToolParser
from quire.text.tools.parser import parse_message, parser_for

__all__ = ["Call", "CallDelta", "Message", "MessageDelta", "Prose", "ToolParser", "parse_message", "parser_for"]
