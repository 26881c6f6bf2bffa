"""Text to token ids and back: tokenizer.json, chat templates, text that arrives token by token.

Chat templates are programs out of a downloaded file: they run in Jinja's immutable sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

_UNKNOWN = "\ufffd"
# A character has up to four bytes, of which three may have come.
_MAX_INCOMPLETE = 3
# Tokens after which bytes that make no sense are given out as they are.
_MAX_HELD = 8
# Tokens of the prompt that decide how the next one is spelt; and the most ever decoded at once.
_CONTEXT, _WINDOW = 6, 64


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
      bos_id: Begin-of-sequence id, or None.
      eos_id: End-of-sequence id, or None; a model may have more, see ``ModelConfig``.
      chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        # A file may ask to cut or pad everything to one length: wanted in training only.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in self._added.items() if token.special)
        self._special_tokens = dict(special_tokens or {})
        for key, token in (("bos_token", bos_token), ("eos_token", eos_token)):
            if token is not None:
                self._special_tokens[key] = token
        self.bos_id = self._id("bos_token", bos_token)
        self.eos_id = self._id("eos_token", eos_token)
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where present, ``tokenizer_config.json`` and templates.

        Raises:
          ValueError: If tokenizer.json is missing, or a file is damaged; names it.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            others = [n for n in ("tokenizer.model", "vocab.json") if (folder / n).exists()]
            hint = f" ({others[0]} alone is not read; convert it)" if others else ""
            raise ValueError(f"{folder} has no tokenizer.json{hint}; download it")
        try:
            tokenizer = FastTokenizer.from_file(str(path))
        except Exception as e:  # the tokenizers library raises bare Exception
            raise ValueError(f"{path} is no usable tokenizer ({e}); download it again") from e
        config = _read_json(folder / "tokenizer_config.json")
        special = _read_json(folder / "special_tokens_map.json") | config
        tokens = {
            key: text
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := _token_text(special.get(key))) is not None
        }
        return cls(
            tokenizer,
            bos_token=tokens.get("bos_token"),
            eos_token=tokens.get("eos_token"),
            chat_template=_chat_template(folder, config),
            special_tokens=tokens,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; the model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; by default with the begin-of-sequence id where the model has one.

        Raises:
          ValueError: If the text holds half of a surrogate pair, as bytes that are not UTF-8 become
            in command-line arguments.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is no Unicode at character {error.start}") from None
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that form no character become U+FFFD."""
        # The library's own skipping misses special tokens that its normalizer rewrites (Llama 2).
        kept = [i for i in ids if not (skip_special_tokens and i in self._special_ids)]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def token(self, id: int) -> str | None:
        """How one id is spelt in the vocabulary; None if there is no such id."""
        return self._added[id].content if id in self._added else self._tokenizer.id_to_token(id)

    def stream(self, context: Sequence[int] = (), **kwargs: bool) -> TokenStream:
        """Incremental decoding of tokens that follow ``context`` (the prompt)."""
        return TokenStream(self, context, **kwargs)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, by the model's chat template.

        Args:
          messages: ``{"role": ..., "content": ...}`` each.
          add_generation_prompt: End with the header of the assistant's turn.
          tools: JSON schemas of callable tools, where the template knows them.
          **variables: What else the template uses, such as ``enable_thinking=False``.

        Returns:
          Text with special tokens spelt out: encode it with ``add_special_tokens=False``.

        Raises:
          ValueError: If there is no template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template (neither chat_template in "
                "tokenizer_config.json nor chat_template.jinja); send a plain prompt, or set "
                "tokenizer.chat_template"
            )
        if not messages:
            raise ValueError("messages is empty; at least one message is needed")
        values = {**self._special_tokens, **variables}
        try:
            return _compile(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **values,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, OverflowError) as e:
            raise ValueError(f"the chat template does not accept these messages: {e}") from e

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of ``render_chat``."""
        return self.encode(self.render_chat(messages, **kwargs), add_special_tokens=False)

    def _id(self, key: str, token: str | None) -> int | None:
        if token is None:
            return None
        id = self._tokenizer.token_to_id(token)
        if id is None:
            raise ValueError(f"{key}={token!r} of tokenizer_config.json is not in tokenizer.json")
        return id


class TokenStream:
    """Text of tokens that arrive one by one; the pieces join to the text of the whole.

    Tokens are decoded together with those of the piece before, because a token alone does not tell
    whether a space precedes it. What may still change is held back: up to three U+FFFD at the end
    may be the bytes of one incomplete character, and decoders with byte fallback void a whole run
    of bytes, earlier characters included, until its last one is complete.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        size = _CONTEXT
        self._ids = list(context[-size:])
        # Start at a whole character.
        while self._text().startswith(_UNKNOWN) and len(self._ids) < min(len(context), _WINDOW):
            size += 1
            self._ids = list(context[-size:])
        self._boundary = len(self._ids)  # where the last complete piece ended
        self._given = self._text()  # text of the window that has been given out
        self._held = 0  # tokens since the text last made sense

    def push(self, ids: int | Iterable[int]) -> str:
        """Add tokens; returns the text that is complete now, possibly empty."""
        return "".join(self._push_one(id) for id in ([ids] if isinstance(ids, int) else ids))

    def flush(self) -> str:
        """The text still held back, with U+FFFD for an incomplete character."""
        return self._advance(self._text())

    def _push_one(self, id: int) -> str:
        self._ids.append(id)
        self._held += 1
        whole = self._text()
        complete = whole
        if len(self._ids) < _WINDOW:
            for _ in range(_MAX_INCOMPLETE):
                complete = complete.removesuffix(_UNKNOWN)
            if not complete.startswith(self._given) and self._held < _MAX_HELD:
                return ""
        text = self._advance(complete)
        if text and complete == whole:
            # Nothing is open: only this piece is needed to decode the next.
            del self._ids[: self._boundary]
            self._boundary, self._given = len(self._ids), self._text()
        return text

    def _advance(self, complete: str) -> str:
        text = complete[len(self._given) :]
        self._given, self._held = complete, 0
        return text

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}); download it again") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _token_text(value: Any) -> str | None:
    # Either the text or an object with its stripping rules.
    return value.get("content") if isinstance(value, dict) else value


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template")
    template = config.get("chat_template") if template is None else template
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default", next(iter(named.values())))
    return template


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}``: marks the assistant's text for training; here it is only passed on."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
    # Jinja's own tojson escapes for HTML.
    dump: Callable[..., str] = json.dumps
    environment.filters["tojson"] = lambda value, indent=None, **kwargs: dump(
        value, ensure_ascii=False, indent=indent, **kwargs
    )
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
