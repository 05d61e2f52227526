"""The fields of requests. The types are checked here; ranges are SamplingParams' business, and checked there.

Every field may be null, which means its default. ``Any`` with a JSON schema stands where a field has several forms that
are told apart by hand, so that an error can name the form that was meant.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

_STOP = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
_EARLY_STOPPING = {"anyOf": [{"type": "boolean"}, {"const": "never"}, {"type": "null"}]}
_SIDE = {"enum": ["left", "right", None]}
_FLOAT_FORMAT = {"enum": ["float", "base64", None]}
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}},
    ]
}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}}},
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["developer", "system", "user", "assistant", "tool"]},
        "content": _CONTENT,
        "name": {"type": "string"},
        "tool_calls": {"type": "array", "items": _CALL},
        "tool_call_id": {"type": "string"},
        "reasoning_content": {"type": "string"},
    },
}

_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": "boolean"},
    },
}
_TOOL = {"type": "object", "required": ["function"], "properties": {"type": {"const": "function"}, "function": _FUNCTION}}
_NAMED = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
_TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        {"type": "object", "required": ["type", "function"], "properties": {"type": {"const": "function"}, "function": _NAMED}},
        {"type": "null"},
    ]
}
_FUNCTION_CALL = {"anyOf": [{"enum": ["auto", "none"]}, _NAMED, {"type": "null"}]}
_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}
_RESPONSE_FORMAT = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "required": ["schema"],
            "properties": {"name": {"type": "string"}, "schema": {"type": "object"}, "strict": {"type": "boolean"}},
        },
    },
}
_STRUCTURED_OUTPUTS = {
    "type": "object",
    "description": "exactly one of json, regex, choice, grammar and json_object",
    "properties": {
        "json": _SCHEMA,
        "regex": {"type": "string"},
        "choice": {"type": "array", "items": {"type": "string"}},
        "grammar": {"type": "string", "description": "Lark (llguidance's dialect) or GBNF"},
        "json_object": {"const": True},
        "disable_any_whitespace": {"type": "boolean"},
        "whitespace_pattern": {"type": "string"},
    },
}

Prompt = Annotated[Any, WithJsonSchema(_PROMPT)]
Stop = Annotated[Any, WithJsonSchema(_STOP)]
TruncationSide = Annotated[Any, WithJsonSchema(_SIDE)]
EarlyStopping = Annotated[Any, WithJsonSchema(_EARLY_STOPPING)]
EncodingFormat = Annotated[Any, WithJsonSchema(_FLOAT_FORMAT)]
Pooling = Annotated[Any, WithJsonSchema({"enum": ["mean", "last", None]})]
JsonSchema = Annotated[Any, WithJsonSchema(_SCHEMA)]
ResponseFormat = Annotated[dict[str, Any], WithJsonSchema(_RESPONSE_FORMAT)]
StructuredOutputs = Annotated[dict[str, Any], WithJsonSchema(_STRUCTURED_OUTPUTS)]
Message = Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]
Tool = Annotated[dict[str, Any], WithJsonSchema(_TOOL)]
ToolChoice = Annotated[Any, WithJsonSchema(_TOOL_CHOICE)]
Function = Annotated[dict[str, Any], WithJsonSchema(_FUNCTION)]
FunctionCall = Annotated[Any, WithJsonSchema(_FUNCTION_CALL)]


class _Body(BaseModel):
    # strict: "5" is not a number here, and true is not 1. Unknown fields are refused by quire.server.calls.fields.
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Body):
    include_usage: bool | None = Field(None, description="send one more chunk at the end, with the usage and no choices")
    continuous_usage_stats: bool | None = Field(None, description="send the usage so far with every chunk")
    include_obfuscation: bool | None = Field(None, description="accepted and ignored")


class CacheRetention(_Body):
    model_config = ConfigDict(strict=True, extra="forbid")

    priority: int = Field(description="1 to 100; higher is kept longer")
    seconds: float = Field(description="how long the wish holds; above 0, at most 86400")


class GenerationRequest(_Body):
    """What /v1/completions and /v1/chat/completions have in common."""

    model: str | None = Field(None, description="id from /v1/models; may be left out, since one model is served")
    n: int | None = Field(None, description="samples for each prompt")
    best_of: int | None = Field(None, description="make this many samples, return the n with the highest mean log-probability")
    use_beam_search: bool | None = Field(None, description="search for the most likely outputs instead of sampling")
    beam_width: int | None = Field(None, description="number of beams; default: best_of, or n")
    length_penalty: float | None = Field(None, description="beams are ranked by sum of log-probabilities / length ** length_penalty")
    early_stopping: EarlyStopping = Field(None, description='when a beam search ends: true, false or "never", as in transformers')
    temperature: float | None = Field(None, description="0 is greedy")
    top_p: float | None = Field(None, description="in (0, 1]")
    top_k: int | None = Field(None, description="0 or -1 keeps every token")
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = Field(None, description="1 is off")
    logit_bias: dict[str, float] | None = Field(None, description="token id → value added to its logit, -100 to 100")
    seed: int | None = Field(None, description="the same request with the same seed gives the same output")
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    allowed_token_ids: list[int] | None = Field(None, description="only these tokens may be generated")
    bad_words: list[str] | None = Field(None, description="words that are not completed in the output")
    response_format: ResponseFormat | None = Field(None, description="JSON: any object, or what a schema says")
    structured_outputs: StructuredOutputs | None = Field(None, description="the form that the output must have")
    guided_json: JsonSchema = Field(None, description="older name of structured_outputs.json")
    guided_regex: str | None = Field(None, description="older name of structured_outputs.regex")
    guided_choice: list[str] | None = Field(None, description="older name of structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="older name of structured_outputs.grammar")
    guided_whitespace_pattern: str | None = Field(None, description="with guided_json: what may stand between the parts of JSON")
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = Field(None, description="let the tokenizer add its special tokens to text prompts")
    priority: int | None = Field(None, description="lower runs earlier, and takes the place of a higher one that runs; default 0")
    cache_salt: str | None = Field(None, description="cached prefixes are shared only among requests with the same salt")
    cache_retention: CacheRetention | None = Field(None, description="a wish that the prompt stays in the prefix cache")
    return_token_ids: bool | None = Field(None, description="return token ids beside the text")
    return_tokens_as_token_ids: bool | None = Field(None, description='name tokens in logprobs by their ids, as in "token_id:17"')
    prompt_logprobs: int | None = Field(None, description="report this many most likely tokens for each position of the prompt; 0 to 20")
    truncate_prompt_tokens: int | None = Field(
        None, description="keep this many tokens of the prompt; -1 keeps what the context leaves beside max_tokens"
    )
    truncation_side: TruncationSide = Field(None, description='"left" (default) drops the beginning of the prompt, "right" its end')
    request_id: str | None = Field(None, description="ends the answer's id, and is echoed in X-Request-Id; default: X-Request-Id's value")
    timeout: float | None = Field(None, description="seconds after which the request ends with an error if it has not ended by itself")
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(GenerationRequest):
    prompt: Prompt = Field(description="text, token ids, or a list of either")
    echo: bool | None = Field(None, description="put the prompt before the output")
    logprobs: int | None = Field(None, description="report this many most likely tokens for each position")


class ChatCompletionRequest(GenerationRequest):
    messages: list[Message]
    max_completion_tokens: int | None = Field(None, description="newer name of max_tokens; default: what the context leaves")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(None, description="functions that the model may call")
    tool_choice: ToolChoice = Field(None, description="which it may or must call; default: auto")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call (default: true)")
    functions: list[Function] | None = Field(None, description="older name of tools; answered in the older form")
    function_call: FunctionCall = Field(None, description="older name of tool_choice")
    include_reasoning: bool | None = Field(None, description="false: leave the reasoning out of the answer (default: true)")
    reasoning_effort: str | None = Field(
        None, description="a variable of the chat template, where it has it; none switches its enable_thinking off, anything else on"
    )
    add_generation_prompt: bool | None = Field(None, description="end the prompt with the start of an assistant message (default: true)")
    continue_final_message: bool | None = Field(None, description="go on with the last message instead of answering it")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="more variables for the model's chat template")


class EmbeddingRequest(_Body):
    model: str | None = Field(None, description="id from /v1/models; may be left out, since one model is served")
    input: Prompt = Field(description="text, token ids, or a list of either")
    encoding_format: EncodingFormat = Field(None, description='"float" (default) or "base64": little-endian float32')
    dimensions: int | None = Field(None, description="keep this many numbers of each vector, and normalise it again")
    pooling: Pooling = Field(None, description='"mean" of all tokens or "last" token; default: what the server was started with')
    add_special_tokens: bool | None = Field(None, description="let the tokenizer add its special tokens to texts")
    truncate_prompt_tokens: int | None = Field(None, description="keep this many tokens of each input; -1 keeps what the context holds")
    truncation_side: TruncationSide = Field(None, description='"left" (default) drops the beginning of an input, "right" its end')
    priority: int | None = Field(None, description="lower runs earlier; default 0")
    cache_salt: str | None = Field(None, description="cached prefixes are shared only among requests with the same salt")
    request_id: str | None = Field(None, description="ends the answer's id, and is echoed in X-Request-Id; default: X-Request-Id's value")


class TokenizeRequest(_Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(None, description="default: true for prompt, false for messages")
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: list[int]


class FileUpload(_Body):
    file: bytes = Field(description="JSONL: an object a line, with custom_id, method (POST), url (the batch's endpoint) and body")
    purpose: str = Field(description='"batch"')


class BatchRequest(_Body):
    input_file_id: str = Field(description="id of an uploaded file")
    endpoint: str = Field(description="of all lines: /v1/chat/completions, /v1/completions, ...")
    completion_window: str = Field(description='"24h": hours after which what is not answered expires; 1h to 720h')
    metadata: dict[str, str] | None = Field(None, description="at most 16 texts, kept and shown")
