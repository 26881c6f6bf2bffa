"""Calibration text: a file to token sequences of one length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

SEPARATOR = "<|endoftext|>"


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file.

    Args:
      path: ``.jsonl`` with an object with ``"text"`` on each line, or ``.json`` with a list of
        strings; any other file is text, in which ``<|endoftext|>`` separates documents.

    Returns:
      Documents that are not blank, stripped.

    Raises:
      ValueError: If the file is not what its name says, or holds no document.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it") from None
    if path.suffix == ".jsonl":
        # Split on line feeds only: strings may hold other characters that str.splitlines splits at.
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        documents = [_field(path, number, line) for number, line in lines]
    elif path.suffix == ".json":
        try:
            documents = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error})") from None
        if not isinstance(documents, list) or not all(isinstance(d, str) for d in documents):
            raise ValueError(f"{path} must hold a list of strings")
    else:
        documents = text.split(SEPARATOR)
    documents = [d.strip() for d in documents if d.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def _field(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
        text = value["text"] if isinstance(value, dict) else None
    except (ValueError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'{path}:{number} must be an object with a string "text"')
    return text


def sample_tokens(
    documents: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    *,
    num_samples: int,
    seq_len: int,
    bos_id: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Token sequences spread evenly over the documents.

    Documents longer than a sequence are cut into several, each with a begin-of-sequence token.

    Args:
      documents: Texts.
      encode: Text to token ids, with the begin-of-sequence token where the model has one.
      num_samples: Sequences wanted; fewer are returned if there are no more.
      seq_len: Longest sequence.
      bos_id: Put before the later pieces of a long document; None puts nothing.

    Returns:
      ``(tokens, valid)``: int32 and bool ``(samples, length)``, length at most ``seq_len`` and no
      longer than the longest sample needs (rounded up to 64).

    Raises:
      ValueError: If sizes are not positive.
    """
    if num_samples < 1 or seq_len < 2:
        raise ValueError(f"{num_samples=} must be at least 1 and {seq_len=} at least 2")
    head = [] if bos_id is None else [bos_id]
    # Documents first, so that a huge file is not tokenized for a few samples.
    stride = max(1, len(documents) // num_samples)
    samples: list[list[int]] = []
    for document in documents[::stride]:
        ids = list(encode(document))
        samples.append(ids[:seq_len])
        step = seq_len - len(head)
        samples += [head + ids[i : i + step] for i in range(seq_len, len(ids), step)]
    if len(samples) > num_samples:
        picks = np.linspace(0, len(samples) - 1, num_samples).round().astype(int)
        samples = [samples[i] for i in picks]
    length = min(seq_len, -(-max(map(len, samples)) // 64) * 64)
    tokens = np.zeros((len(samples), length), np.int32)
    valid = np.zeros((len(samples), length), bool)
    for row, ids in enumerate(samples):
        tokens[row, : len(ids)] = ids
        valid[row, : len(ids)] = True
    return tokens, valid
