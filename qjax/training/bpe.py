"""Byte-level BPE tokenizers: train one on plain text and save it the way Hugging Face reads it.

Byte-level means that every byte string can be encoded, so no text is ever out of vocabulary and
perplexity per byte is well defined. The files written here (``tokenizer.json``,
``tokenizer_config.json``) load unchanged with ``transformers.AutoTokenizer`` and with the
``tokenizers`` library.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qjax._files import replacing, write_text_atomic

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)  # ids 0, 1, 2


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file; names ending in ``.xz`` are decompressed.

    Raises:
      ValueError: If the file does not exist, is empty, or is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        missing = "is no file" if path.exists() else "does not exist"
        raise ValueError(
            f"text file {str(path)!r} {missing}; give the path of a .txt or .txt.xz file"
        )
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = data.decode("utf-8-sig")  # a byte order mark is no text
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(
            f"text file {str(path)!r} cannot be read: {error}; it must be UTF-8 text"
        ) from error
    if not text.strip():
        raise ValueError(f"text file {str(path)!r} is empty; give a file with text in it")
    return text


def split_text(text: str, chunk_chars: int) -> Iterator[str]:
    """Cuts ``text`` into pieces of about ``chunk_chars`` characters, at line breaks if possible.

    The pieces joined give the text back exactly. Cutting just before a line's first character keeps
    the words whole, so encoding the pieces gives (up to a token at each cut) the encoding of the
    whole.
    """
    start = 0
    while start < len(text):
        end = min(start + chunk_chars, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
            # A run of line breaks is one pre-token: cut after its last one.
            while end < len(text) and text[end] == "\n":
                end += 1
        yield text[start:end]
        start = end


def check_vocab_size(vocab_size: int) -> None:
    """Raises ``ValueError`` if there is no room for the bytes and the special tokens."""
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(
            f"{vocab_size=} must be at least {least} (bytes and special tokens); 4096 suits small "
            "models"
        )


def train_bpe(text: str, vocab_size: int, *, sample_chars: int = 20_000_000) -> Any:
    """Trains a byte-level BPE tokenizer which puts ``<|bos|>`` before every text.

    Args:
      text: Training text.
      vocab_size: Number of entries, special tokens and the 256 bytes included; fewer where the text
        has too few different words.
      sample_chars: The merges are learned from at most about this many characters, taken in evenly
      spaced pieces.

    Returns:
      A ``tokenizers.Tokenizer``.

    Raises:
      ValueError: If ``vocab_size`` leaves no room for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = list(split_text(text, 100_000))
    step = max(1, round(len(text) / sample_chars))
    tokenizer.train_from_iterator(pieces[::step], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: str | Path, *, model_max_length: int) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``directory``."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    # tokenizer.json last: where it is, a resumed run takes the rest to be there too.
    write_text_atomic(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text_atomic(directory / "tokenizer.json", tokenizer.to_str())


def encode_corpus(tokenizer: Any, text: str, *, chunk_chars: int = 200_000) -> np.ndarray:
    """Encodes a long text without special tokens, in parallel pieces: ``[tokens]``.

    Ids are uint16, or uint32 where the vocabulary has more than 65,536 entries.
    """
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 65536 else np.uint32
    pieces = list(split_text(text, chunk_chars))
    encoded = []
    for start in range(0, len(pieces), 64):  # bounded: Encoding objects are some 100 bytes a token
        batch = tokenizer.encode_batch(pieces[start : start + 64], add_special_tokens=False)
        encoded += [np.asarray(e.ids, dtype) for e in batch]
    return np.concatenate(encoded)


def load_or_train_tokenizer(
    directory: str | Path, text: str, vocab_size: int, *, model_max_length: int
) -> Any:
    """The tokenizer in ``directory``; trained on ``text`` and saved there if there is none yet.

    Raises:
      ValueError: If the one there is larger than ``vocab_size``.
    """
    from tokenizers import Tokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        tokenizer = train_bpe(text, vocab_size)
        save_tokenizer(tokenizer, directory, model_max_length=model_max_length)
        return tokenizer
    tokenizer = Tokenizer.from_file(str(path))
    # A small text may not have enough different words to fill the vocabulary.
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"{str(path)!r} has {tokenizer.get_vocab_size()} entries, more than {vocab_size=}; use "
            "the size it was made with, or another output directory"
        )
    return tokenizer


def load_or_encode(directory: str | Path, tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of ``text`` as a memory-mapped array, encoded once into a file in ``directory``."""
    path = Path(directory) / f"tokens-{zlib.crc32(text.encode()):08x}.npy"
    if not path.exists():
        ids = encode_corpus(tokenizer, text)
        with replacing(path) as temporary:
            np.save(temporary, ids)
    return np.load(path, mmap_mode="r")
