"""Prompts from files: one per line, as text or as JSON objects with settings of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.sampling import MAX_SEED, SamplingParams
from qjax.tokenizer import Tokenizer

_SETTINGS: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
    "ignore_eos": bool,
}
_KEYS = ("prompt", "messages", *_SETTINGS)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      where: Where it came from, for messages: ``prompts.txt:3`` or ``--prompt 1``.
      text: Its text; None for a conversation.
      messages: ``{"role", "content"}`` each; None for text.
      settings: Sampling settings that the file gives for this prompt.
    """

    where: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def sampling(self, defaults: SamplingParams, index: int) -> SamplingParams:
        """Its settings; prompt ``index`` gets seed ``defaults.seed + index`` unless it has one.

        Raises:
          ValueError: If a setting is out of range; names the place.
        """
        seed = (defaults.seed + index) % (MAX_SEED + 1)
        try:
            return dataclasses.replace(defaults, **{"seed": seed, **self.settings})
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

    def encode(self, tokenizer: Tokenizer, *, chat: bool) -> tuple[str, list[int]]:
        """The text that the model sees, and its token ids.

        Args:
          tokenizer: The model's tokenizer.
          chat: Treat text as one user message. Conversations always use the chat template.

        Raises:
          ValueError: If there is no chat template or it refuses the messages, or no token is left.
        """
        messages = self.messages
        if messages is None and chat:
            messages = [{"role": "user", "content": self.text}]
        try:
            if messages is None:
                text = self.text or ""
                ids = tokenizer.encode(text)
            else:
                text = tokenizer.render_chat(messages)
                ids = tokenizer.encode(text, add_special_tokens=False)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None
        if not ids:
            raise ValueError(f"{self.where}: the prompt is empty; there is nothing to continue")
        return text, ids


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a file of prompts.

    Args:
      path: ``.txt``: one prompt per line, blank lines are skipped. ``.jsonl``: one object per line
        with ``prompt`` (text) or ``messages`` (a conversation), and optionally ``max_new_tokens``,
        ``temperature``, ``top_k``, ``top_p``, ``seed``, ``ignore_eos``.

    Returns:
      The prompts in the file's order.

    Raises:
      ValueError: If the ending is neither, a line cannot be understood (names it), or the file
        holds no prompt.
      OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: prompts are read from .txt or .jsonl files; rename or convert it"
        )
    prompts = []
    # Split on line feeds only: text may hold the other characters that str.splitlines splits at.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            line = raw.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
        if line.strip():
            prompts.append(Prompt(where, line) if path.suffix == ".txt" else _parse(where, line))
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _parse(where: str, line: str) -> Prompt:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # too many digits or brackets for Python
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object with 'prompt', got {line.strip()[:40]}")
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    text, messages = values.get("prompt"), values.get("messages")
    if (text is None) == (messages is None):
        raise ValueError(f"{where}: give either 'prompt' or 'messages'")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: 'prompt' must be a string, not {text!r}")
    if messages is not None and not (
        isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    ):
        raise ValueError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    settings = {}
    for name, kind in _SETTINGS.items():
        if name in values:
            settings[name] = _setting(where, name, values[name], kind)
    return Prompt(where, text, messages, settings)


def _setting(where: str, name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{where}: {name!r} is larger than any number of its kind") from None
    if type(value) is not kind:
        raise ValueError(f"{where}: {name!r} must be of type {kind.__name__}, not {value!r}")
    return value


def gather_prompts(texts: Sequence[str], path: str | Path | None) -> list[Prompt]:
    """Prompts of the command line, then those of a file.

    Raises:
      ValueError: If there are none, or as ``read_prompts``.
    """
    prompts = [Prompt(f"--prompt {i}", text) for i, text in enumerate(texts, 1)]
    if path is not None:
        prompts += read_prompts(path)
    if not prompts:
        raise ValueError("there is no prompt; give --prompt TEXT or --prompts FILE")
    return prompts
