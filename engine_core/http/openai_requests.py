"""From the JSON body of OpenAI's API to a ``GenerationRequest``. Every field is read, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from engine_core.errors import InvalidSamplingError
from engine_core.http.errors import ModelError
from engine_core.http.fields import FieldError, Fields
from engine_core.request import (
    LIMITS,
    SAMPLING_OPTIONS,
    TOOL_CHOICES,
    ChatMessage,
    GenerationRequest,
    RequestDefaults,
    SamplingParams,
    Tool,
    ToolCall,
)

# Fields of OpenAI's API that say something to OpenAI's servers and nothing to a model.
WITHOUT_EFFECT = (
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
_MAX_TOKENS = "max_new_tokens"
_MAX_TOKENS_NAMES = ("max_tokens", "max_completion_tokens", _MAX_TOKENS)
_ROLES = {"developer": "system"}
_EFFORTS = {"none": "off"} | dict.fromkeys(("minimal", "low", "medium", "high", "xhigh"), "on")
_BY_REPETITION = "use repetition_penalty instead."
# Names of vLLM → fields of a GenerationRequest.
_FORMS = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}
_NO_LOGPROBS = "the backends keep the logits on their device."


class UrlImages:
    """The images of a request, as data URLs that ``read_images`` decodes."""

    def __init__(self, urls: Iterable[str]) -> None:
        self._urls = list(urls)
        self.count, self.num_bytes = len(self._urls), sum(map(len, self._urls))

    def read_images(self, request: GenerationRequest, go_on: Callable[[], None] = lambda: None) -> GenerationRequest:
        """Return ``request`` with its images. To be called once; ``go_on`` is called before each image.

        Raises InvalidImageError, and what ``go_on`` raises.
        """
        # Pillow is loaded by the first image.
        from engine_core.vision.pictures import check_pictures, decode_pictures, open_data_url

        pictures = []
        while self._urls:  # megabytes, which go one by one
            go_on()
            pictures.append(open_data_url(self._urls.pop(0)))
        check_pictures(pictures)
        return request.replace(images=decode_pictures(pictures, go_on))


@dataclass(frozen=True)
class Asked:
    """A request and how its client wants the answer."""

    request: GenerationRequest
    model: str
    stream: bool
    include_usage: bool  # as the last event of a stream
    images: UrlImages | None = None


def chat_request(fields: Fields, defaults: RequestDefaults, adapters: dict[str, str]) -> Asked:
    """Return the request of /v1/chat/completions.

    ``adapters``: name of each served model → its LoRA adapter, "" for the model itself; the first is the default.
    Raises RequestError.
    """
    LIMITS.check_messages(len(messages := fields.objects("messages")))
    urls: list[str] = []
    session = fields.take("session", str) or ""
    form = _form(fields, _schema(fields.object("response_format")))
    fields.only("logprobs", False, why=_NO_LOGPROBS)
    fields.only("top_logprobs", 0, why=_NO_LOGPROBS)
    fields.only("store", False, why="nothing is stored here.")
    fields.only("modalities", ["text"], why="answers are text.")
    fields.only("audio", why="answers are text.")
    fields.only("prediction", why="the node guesses tokens by itself (parameter speculation).")
    fields.only("web_search_options", why="a robot's model has no web search; give it a tool.")
    fields.only("verbosity", "medium", why="say it in the system message.")
    fields.only("functions", why="use tools.")
    fields.only("function_call", why="use tool_choice.")
    parallel = fields.take("parallel_tool_calls", bool)
    thinking, variables = _thinking(fields)
    content = {
        "messages": defaults.with_system(tuple(_message(message, urls) for message in messages), session),
        "session": session,
        "default_system": defaults.system_prompt,
        "context_policy": fields.take("context_policy", str) or "refuse",
        **form,
        "tools": tuple(_tool(tool) for tool in fields.objects("tools")),
        "tool_choice": _tool_choice(fields),
        "parallel_tool_calls": parallel is not False,
        "template_variables": variables,
        "thinking": thinking,
        "thinking_budget": fields.take("thinking_budget", int) or 0,
        "allow_special": fields.take("allow_special", bool) or False,
    }
    LIMITS.check_images(len(urls), sum(map(len, urls)))
    asked = _asked("chatcmpl", fields, defaults, adapters, content)
    return dataclasses.replace(asked, images=UrlImages(urls)) if urls else asked


def completion_request(fields: Fields, defaults: RequestDefaults, adapters: dict[str, str]) -> Asked:
    """Return the request of /v1/completions, as ``chat_request`` does."""
    prompt = fields.take("prompt", str, list)
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise FieldError("prompt", "prompt is a list, but it must be a string or a list of one string.")
        prompt = prompt[0]
    fields.only("logprobs", why=_NO_LOGPROBS)
    fields.only("echo", False, why="put the prompt before the answer yourself.")
    fields.only("suffix", "", why="the models continue a text and fill no gaps.")
    fields.only("best_of", 1, why="one answer is made of each request.")
    return _asked("cmpl", fields, defaults, adapters, {"prompt": prompt or "", **_form(fields, "")})


def _asked(prefix: str, fields: Fields, defaults: RequestDefaults, adapters: dict[str, str], content: dict) -> Asked:
    """Read what both kinds of request have."""
    model = fields.take("model", str) or next(iter(adapters))
    if model not in adapters:
        raise ModelError(model, adapters)
    stream = fields.take("stream", bool) or False
    include_usage = False
    if (options := fields.object("stream_options")) is not None:
        if not stream:
            raise FieldError("stream_options", "stream_options is given, but stream is not true.")
        include_usage = options.take("include_usage", bool) or False
        options.only("include_obfuscation", False, why="events are not padded.")
        options.finish()
    sampling = _sampling(fields, defaults.sampling)
    stop = fields.take("stop", str, list)
    if isinstance(stop, list) and not all(isinstance(text, str) for text in stop):
        raise FieldError("stop", "stop is a list of other things than strings.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    deadline = fields.take("deadline", float)
    priority = fields.take("priority", int) or 0
    fields.only("n", 1, why="one answer is made of each request; send it again for another one.")
    fields.only("frequency_penalty", 0, 0.0, why=_BY_REPETITION)
    fields.only("presence_penalty", 0, 0.0, why=_BY_REPETITION)
    fields.skip(WITHOUT_EFFECT)
    fields.finish()
    request = GenerationRequest(
        request_id=f"{prefix}-{uuid.uuid4().hex}",
        sampling=sampling,
        stop=stops,
        adapter=adapters[model],
        priority=priority,
        timeout=deadline or defaults.request_timeout,
        stream_interval=defaults.stream_interval,
        **content,
    )
    return Asked(defaults.with_stop(request), model, stream, include_usage)


def _message(fields: Fields, urls: list[str]) -> ChatMessage:
    """``urls``: get those of the message's images."""
    role = fields.take("role", str)
    if role is None:
        raise FieldError(fields.name("role"), f"{fields.path} has no role.")
    content, places = _content(fields, urls if role == "user" else None)
    name = fields.take("name", str) or ""
    more: dict = {}
    if role == "assistant":
        fields.only("refusal", why="send it as content.")
        fields.only("audio", why="messages are text.")
        fields.only("function_call", why="use tool_calls.")
        fields.only("annotations", [], why="messages are text.")
        thoughts = [fields.take(key, str) for key in ("reasoning_content", "reasoning")]
        more["reasoning"] = next(filter(None, thoughts), "")
        more["tool_calls"] = tuple(_call(call) for call in fields.objects("tool_calls"))
    elif role == "tool":
        more["tool_call_id"] = fields.take("tool_call_id", str) or ""
        more["name"] = name  # of who speaks, in the other roles: no template shows it; documented
    fields.finish()
    return ChatMessage(_ROLES.get(role, role), content, images=places, **more)


def _call(fields: Fields) -> ToolCall:
    """Return a call of a message."""
    function = _function(fields)
    call_id = fields.take("id", str) or ""
    fields.take("index", int)  # clients that put a stream together keep it
    fields.finish()
    name, arguments = _name(function), function.take("arguments", str) or ""
    function.finish()
    return ToolCall(call_id, name, arguments)


def _tool(fields: Fields) -> Tool:
    function = _function(fields)
    fields.finish()
    name, description = _name(function), function.take("description", str) or ""
    parameters = function.take("parameters", dict)
    function.take("strict", bool)  # the schema is always kept to
    function.finish()
    return Tool(name, description, _json(function.name("parameters"), parameters))


def _tool_choice(fields: Fields) -> str:
    """Return one of ``TOOL_CHOICES``, or the name of a tool."""
    choice = fields.take("tool_choice", str, dict)
    if choice is None:
        return "auto"
    if not isinstance(choice, str):
        named = Fields(choice, fields.name("tool_choice"))
        function = _function(named)
        named.finish()
        name = _name(function)
        function.finish()
        if name in TOOL_CHOICES:
            raise FieldError(named.path, f"A tool with the name {name!r} cannot be chosen; give it another name.")
        return name
    if choice not in TOOL_CHOICES:
        raise FieldError(
            "tool_choice",
            f"tool_choice is {choice[:64]!r}, but it must be {', '.join(TOOL_CHOICES)} or an object that names a "
            "function.",
        )
    return choice


def _function(fields: Fields) -> Fields:
    """Return the function of a tool, a call or a choice."""
    kind = fields.take("type", str) or "function"
    if kind != "function":
        raise FieldError(
            fields.name("type"), f"{fields.name('type')} is {kind[:32]!r}, but only 'function' is supported."
        )
    function = fields.object("function")
    if function is None:
        raise FieldError(fields.name("function"), f"{fields.path} has no function.")
    return function


def _name(function: Fields) -> str:
    name = function.take("name", str)
    if name is None:
        raise FieldError(function.name("name"), f"{function.path} has no name.")
    return name


def _thinking(fields: Fields) -> tuple[str, str]:
    """Return the request's ``thinking`` and its ``template_variables``."""
    modes = []
    if (mode := fields.take("thinking", str)) is not None:
        modes.append(mode)
    if (effort := fields.take("reasoning_effort", str)) is not None:
        if effort not in _EFFORTS:
            raise FieldError(
                "reasoning_effort",
                f"reasoning_effort is {effort[:32]!r}, but it must be one of {', '.join(_EFFORTS)}.",
            )
        modes.append(_EFFORTS[effort])
    name = "chat_template_kwargs"
    variables = dict(fields.take(name, dict) or {})
    is_enabled = Fields({"enable_thinking": variables.pop("enable_thinking", None)}, name).take("enable_thinking", bool)
    if is_enabled is not None:  # whatever the template calls it
        modes.append("on" if is_enabled else "off")
    if len(set(modes)) > 1:
        raise FieldError(
            "thinking",
            f"thinking, reasoning_effort and {name}.enable_thinking are one switch and differ; give one of them.",
        )
    return (modes[0] if modes else "model"), _json(name, variables or None)


def _json(path: str, value: dict | None) -> str:
    """Return ``value`` as JSON text; "" for None. Raises FieldError."""
    try:
        return "" if value is None else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise FieldError(path, f"{path} has too many objects and lists inside each other.") from None


def _content(fields: Fields, urls: list[str] | None) -> tuple[str, tuple[int, ...]]:
    """Return the text of a message, a string or parts one after another, and the places of its images in it.

    ``urls``: get those of the images; None: it may have none.
    """
    content = fields.take("content", str, list)
    if content is None or isinstance(content, str):
        return content or "", ()
    texts: list[str] = []
    places: list[int] = []
    for index, part in enumerate(content):
        part = Fields(part, f"{fields.name('content')}[{index}]")
        kind = part.take("type", str)
        if kind == "text":
            texts.append(part.take("text", str) or "")
        elif kind == "image_url" and urls is not None:
            urls.append(_image_url(part))
            places.append(sum(map(len, texts)))
        else:
            accepted = "text" if urls is None else "text and image_url"
            raise FieldError(
                part.path, f"{part.path} is of type {(kind or '')[:32]!r}, but only {accepted} is accepted here."
            )
        part.finish()
    return "".join(texts), tuple(places)


def _image_url(part: Fields) -> str:
    value = part.take("image_url", dict, str)
    url = value if isinstance(value, str) else None
    if isinstance(value, dict):
        named = Fields(value, part.name("image_url"))
        url = named.take("url", str)
        named.take("detail", str)  # the node's parameters say how many tokens an image has; documented
        named.finish()
    if not url:
        raise FieldError(part.name("image_url"), f"{part.path} has no URL of an image.")
    return url


def _schema(response_format: Fields | None) -> str:
    """Return the JSON schema that a response_format asks for; "" = free text."""
    if response_format is None:
        return ""
    kind = response_format.take("type", str)
    schema = ""
    if kind == "json_object":
        schema = '{"type": "object"}'
    elif kind == "json_schema":
        wrapper = response_format.object("json_schema")
        inner = None if wrapper is None else wrapper.take("schema", dict)
        if wrapper is None or inner is None:
            raise FieldError("response_format", "response_format has no json_schema with a schema.")
        wrapper.take("name", str)  # the schema is always kept to, whatever it is called
        wrapper.take("description", str)
        wrapper.take("strict", bool)
        wrapper.finish()
        schema = _json("response_format.json_schema.schema", inner)
    elif kind != "text":
        raise FieldError(
            "response_format.type",
            f"response_format.type is {(kind or '')[:32]!r}, but it must be text, json_object or json_schema.",
        )
    response_format.finish()
    return schema


def _form(fields: Fields, json_schema: str) -> dict:
    """Return the form of the answer, fields of a GenerationRequest. ``json_schema``: that of a response_format, or "".

    Beside the node's own names, those of vLLM are read: structured_outputs, and guided_* as it was called before.
    """
    found: list[tuple[str, str, Any]] = [("response_format", "json_schema", json_schema)] if json_schema else []
    outputs = fields.object("structured_outputs") or Fields({}, "structured_outputs")
    for source, prefix in ((outputs, ""), (fields, "guided_")):
        for name, form in _FORMS.items():
            kinds = {"json": (str, dict), "choice": (list,)}.get(name, (str,))
            value = source.take(f"{prefix}{name}", *kinds)
            path = source.name(f"{prefix}{name}")
            if isinstance(value, list):
                if not value or not all(isinstance(each, str) for each in value):
                    raise FieldError(path, f"{path} must be a list of at least one string.")
                LIMITS.check_count("choices", len(value), LIMITS.choices)
                value = tuple(value)
            elif isinstance(value, dict):
                value = _json(path, value)
            if value:
                found.append((path, form, value))
    if schema_name := fields.take("schema_name", str):
        found.append(("schema_name", "schema_name", schema_name))
    if outputs.take("json_object", bool):
        found.append((outputs.name("json_object"), "json_schema", '{"type": "object"}'))
    compact = [fields.take("compact_json", bool), outputs.take("disable_any_whitespace", bool)]
    outputs.finish()
    if len(found) > 1:
        raise FieldError(found[1][0], f"{found[0][0]} and {found[1][0]} are given; an answer has one form, give one.")
    result = {form: value for _, form, value in found}
    return {**result, "compact_json": any(compact), "max_string": fields.take("max_string", int) or 0}


def _sampling(fields: Fields, defaults: SamplingParams) -> SamplingParams:
    given: dict = {}
    for option in SAMPLING_OPTIONS.values():
        if option.name != _MAX_TOKENS and (value := fields.take(option.name, option.kind)) is not None:
            given[option.name] = value
    limits = {value for name in _MAX_TOKENS_NAMES if (value := fields.take(name, int)) is not None}
    if len(limits) > 1:
        raise FieldError("max_tokens", f"{', '.join(_MAX_TOKENS_NAMES)} are one limit and differ; give one of them.")
    if limits:
        given[_MAX_TOKENS] = limits.pop()
    if (bias := fields.take("logit_bias", dict)) is not None:
        given["logit_bias"] = _logit_bias(bias)
    if (ids := fields.take("stop_token_ids", list)) is not None:
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
            raise FieldError("stop_token_ids", "stop_token_ids is a list of other things than token ids.")
        given["stop_token_ids"] = tuple(ids)
    if (ignore_eos := fields.take("ignore_eos", bool)) is not None:
        given["ignore_eos"] = ignore_eos
    return dataclasses.replace(defaults, **given)


def _logit_bias(bias: dict) -> tuple[tuple[int, float], ...]:
    LIMITS.check_count("logit biases", len(bias), LIMITS.logit_biases)
    pairs = []
    for name in bias:
        value = Fields(bias, "logit_bias").take(name, float)
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise InvalidSamplingError(f"logit_bias has the key {name[:32]!r}, but its keys must be token ids.")
        pairs.append((int(name), value or 0.0))
    return tuple(pairs)
