"""Bodies of OpenAI's completion requests, from bytes to engine requests; errors in its shape.

What would change the result and is not done is an error that names it; nothing is ignored but
``user`` and ``metadata``, which only label a request.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import random
from collections.abc import Mapping
from typing import Any

from qjax.sampling import MAX_SEED, SamplingParams
from qjax.serving.scheduler import Request
from qjax.tokenizer import Tokenizer

MAX_CHOICES = 128
"""Texts that one request may ask for, all prompts together."""
MAX_STOPS = 16
COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` for completions; chats may fill the context."""

_LABELS = ("user", "metadata")
_SAMPLING = ("temperature", "top_p", "top_k", "seed", "ignore_eos")
_COMMON = ("model", "max_tokens", "stop", "n", "stream", "stream_options", *_SAMPLING, *_LABELS)
_FIELDS = {
    False: ("prompt", *_COMMON),
    True: ("messages", "max_completion_tokens", "chat_template_kwargs", *_COMMON),
}
# Known elsewhere, not done here: accepted with the one value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
}


class APIError(Exception):
    """An error that the client gets."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        """With a message for humans, and the field or condition it is about."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """What OpenAI's clients expect."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """What requests are read with.

    Attributes:
      model: Name of the model.
      tokenizer: Its tokenizer.
      max_model_len: Longest prompt plus new tokens.
      defaults: Sampling of requests that say nothing; its length and seed are not used.
      max_new_tokens: New tokens of requests that say nothing, less where the context ends; None
        for OpenAI's: 16 for completions, the rest of the context for chats.
      seeds: Seeds of requests that bring none.
    """

    model: str
    tokenizer: Tokenizer
    max_model_len: int
    defaults: SamplingParams = SamplingParams(temperature=1.0)
    max_new_tokens: int | None = None
    seeds: random.Random = dataclasses.field(default_factory=random.Random)


@dataclasses.dataclass(frozen=True)
class Order:
    """A request understood.

    Attributes:
      chat: Whether the answer is a chat message.
      requests: For the engine, one per choice: ``n`` for each prompt.
      prompt_tokens: Tokens of the prompts, each counted once.
      stops: Stop strings.
      stream: Send the text as it comes.
      include_usage: End a stream with the usage.
    """

    chat: bool
    requests: tuple[Request, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_order(body: bytes, settings: ServerSettings, *, chat: bool) -> Order:
    """Understand the body of a request, or say what is wrong with it.

    Args:
      body: JSON.
      settings: Of the server.
      chat: Whether it was sent to ``/v1/chat/completions``.

    Raises:
      APIError: If it cannot be done as asked; names the field and the value.
    """
    fields = _fields(body, chat)
    model = _typed(fields, "model", str, "a string")
    if model not in (None, settings.model):
        raise APIError(
            f"model {model!r} is not served here; the model is {settings.model!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    stream = bool(_typed(fields, "stream", bool, "true or false"))
    n = _typed(fields, "n", int, "an integer")
    n = 1 if n is None else n
    prompts = [_chat_prompt(fields, settings.tokenizer)] if chat else _prompts(fields, settings)
    if n < 1 or n * len(prompts) > MAX_CHOICES:
        raise APIError(
            f"n={n} for {len(prompts)} prompts asks for {n * len(prompts)} texts; there may be 1 "
            f"to {MAX_CHOICES}: send several requests",
            param="n",
        )
    sampling = _sampling(fields, settings)
    if n > 1 and sampling.temperature == 0:
        raise APIError(
            f"n={n} with temperature 0 would give the same text {n} times; use n=1 or a "
            "temperature above 0",
            param="n",
        )
    requests = []
    for ids in prompts:
        length = _new_tokens(fields, settings, len(ids), chat)
        for _ in range(n):
            seed = (sampling.seed + len(requests)) % (MAX_SEED + 1)
            params = dataclasses.replace(sampling, max_new_tokens=length, seed=seed)
            requests.append(Request(tuple(ids), params))
    return Order(
        chat,
        tuple(requests),
        sum(map(len, prompts)),
        _stops(fields),
        stream,
        _include_usage(fields, stream),
    )


def _fields(body: bytes, chat: bool) -> dict[str, Any]:
    """The fields that are given and mean something."""
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise APIError("the body holds half of a surrogate pair, which is no text") from None
    except (ValueError, RecursionError) as error:
        raise APIError(f"the body is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise APIError(f"the body must be a JSON object, not {_show(values)}")
    known, fields = _FIELDS[chat], {}
    for name, value in values.items():
        if value is None or name in _LABELS:
            continue
        if name in known:
            fields[name] = value
        elif name in _NEUTRAL:
            if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
                raise APIError(
                    f"{name}={_show(value)} is not supported; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
        else:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise APIError(f"unknown field {_show(name)}; {hint}", param=name[:80])
    return fields


def _same(value: Any, neutral: Any) -> bool:
    # 0 and False are equal in Python, and do not mean the same.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _typed(fields: Mapping[str, Any], name: str, kind: type, what: str) -> Any:
    value = fields.get(name)
    if value is None:
        return None
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        raise APIError(f"{name} must be {what}, not {_show(value)}", param=name)
    return value


def _sampling(fields: Mapping[str, Any], settings: ServerSettings) -> SamplingParams:
    given = {
        "temperature": _typed(fields, "temperature", float, "a number"),
        "top_p": _typed(fields, "top_p", float, "a number"),
        "top_k": _typed(fields, "top_k", int, "an integer"),
        "seed": _typed(fields, "seed", int, "an integer"),
        "ignore_eos": _typed(fields, "ignore_eos", bool, "true or false"),
    }
    if given["top_k"] == -1:  # how others write "all"
        given["top_k"] = 0
    if given["seed"] is None:
        given["seed"] = settings.seeds.randint(0, MAX_SEED)
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return dataclasses.replace(settings.defaults, **given)
    except ValueError as error:
        raise APIError(str(error), param=str(error).partition("=")[0]) from None


def _new_tokens(
    fields: Mapping[str, Any], settings: ServerSettings, prompt: int, chat: bool
) -> int:
    """``max_new_tokens`` of a prompt with so many tokens."""
    names = ("max_tokens", "max_completion_tokens")
    given = {
        name: v for name in names if (v := _typed(fields, name, int, "an integer")) is not None
    }
    if len(set(given.values())) > 1:
        raise APIError(f"max_tokens and max_completion_tokens differ: {given}; give one of them")
    name, asked = next(iter(given.items()), ("max_tokens", None))
    if asked is not None and asked < 1:
        raise APIError(f"{name}={asked} must be at least 1", param=name)
    limit = settings.max_model_len
    if prompt + (asked or 1) > limit:
        room = f"lower {name} to {limit - prompt}, or " if prompt < limit else ""
        new = "a new token" if asked is None else f"{name}={asked}"
        raise APIError(
            f"the prompt has {prompt} tokens, with {new} more than the {limit} that this server "
            f"was started for (--max-model-len); {room}shorten the prompt",
            param="messages" if chat else "prompt",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    default = settings.max_new_tokens or (limit if chat else COMPLETION_TOKENS)
    return min(default, limit - prompt)


def _prompts(fields: Mapping[str, Any], settings: ServerSettings) -> list[list[int]]:
    """Token ids of the prompts of a completion."""
    value = fields.get("prompt")
    values: list[Any] = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not values or not all(isinstance(v, str) or _is_ids(v) for v in values):
        raise APIError(
            "prompt must be a text, a list of texts, a list of token ids or a list of those, none "
            f"of them empty; it is {_show(value)}",
            param="prompt",
        )
    if len(values) > MAX_CHOICES:
        raise APIError(f"{len(values)} prompts are more than {MAX_CHOICES}; send them in parts")
    prompts: list[list[int]] = [
        settings.tokenizer.encode(v) if isinstance(v, str) else v for v in values
    ]
    if not all(prompts):
        raise APIError("a prompt is empty; there is nothing to continue", param="prompt")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(id) is int for id in value)


def _chat_prompt(fields: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation, by the model's chat template."""
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        raise APIError(f"messages must be a list of messages, not {_show(value)}", param="messages")
    messages = [_message(message, i) for i, message in enumerate(value)]
    variables = _typed(fields, "chat_template_kwargs", dict, "an object") or {}
    for name in variables:
        if name in ("self", "messages", "tools", "documents", "add_generation_prompt"):
            raise APIError(
                f"chat_template_kwargs may not set {name!r}; remove it",
                param="chat_template_kwargs",
            )
    try:
        ids = tokenizer.encode_chat(messages, **variables)
    except ValueError as error:
        raise APIError(str(error), param="messages") from None
    if not ids:
        raise APIError("the chat template made an empty prompt of messages", param="messages")
    return ids


def _message(value: Any, index: int) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise APIError(
            f"{where} must be an object with role and content, not {_show(value)}", param="messages"
        )
    for name in value:
        if name not in ("role", "content") and value[name] not in (None, []):
            raise APIError(
                f"{where}.{name}={_show(value[name])} is not supported; a message has role and "
                "content",
                param=f"{where}.{name[:80]}",
                code="unsupported_parameter",
            )
    content = value.get("content")
    if isinstance(content, list):  # parts, of which only text is understood
        for part in content:
            if not (
                isinstance(part, dict)
                and part.keys() == {"type", "text"}
                and part["type"] == "text"
                and isinstance(part["text"], str)
            ):
                raise APIError(
                    f"{where}.content has the part {_show(part)}; only parts with type text and "
                    "a text are supported",
                    param="messages",
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise APIError(f"{where}.content must be a text, not {_show(content)}", param="messages")
    return {"role": value["role"], "content": content}


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("stop", [])
    value = [value] if isinstance(value, str) else value
    good = isinstance(value, list) and all(isinstance(s, str) and s for s in value)
    if not good or len(value) > MAX_STOPS:
        raise APIError(
            f"stop must be a text or a list of up to {MAX_STOPS} texts, none of them empty; it is "
            f"{_show(fields['stop'])}",
            param="stop",
        )
    return tuple(value)


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = _typed(fields, "stream_options", dict, "an object")
    if options is None:
        return False
    if not stream:
        raise APIError("stream_options has no use without stream", param="stream_options")
    for name in options:
        if name != "include_usage":
            raise APIError(
                f"unknown stream_options.{name[:80]}; known is include_usage",
                param="stream_options",
            )
    return bool(_typed(options, "include_usage", bool, "true or false"))
