"""Write a checkpoint folder in one step: config, safetensors shards, index, tokenizer and card.

Order of work: everything that can be refused is refused first (the format's writer is built from
all layers, every tensor gets a place in a shard); then a temporary folder beside the target is
filled, with few layers in memory at a time; then it is renamed. A reader sees no folder or a whole
one.

A format takes part by a ``QuantizedWriter``; ``qjax.checkpoints.export`` holds the list of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.pipeline import Workers
from qjax.checkpoints.reader import KVScales
from qjax.checkpoints.safetensors_io import DTYPES, INDEX_FILE, SINGLE_FILE
from qjax.quantized_array import QuantizedArray

_MOST_BYTES = 2**30
"""Of tensors which are being made or wait to be written."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Copied from the source folder where they exist.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor that is not there yet."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Linears:
    """What a writer gets to decide on: all linear layers of the model, by checkpoint name.

    Attributes:
      quantized: Layers which hold a ``QuantizedArray``.
      plain: ``(K, N)`` of the others. Engines take every linear layer for quantized unless the
        config says otherwise, so these must be named there.
      kv_scales: Static scales of the KV cache to be written along, or None.
      origin: Tensors of the checkpoint that the layers come from, for what the arrays do not tell.
    """

    quantized: Mapping[str, QuantizedArray]
    plain: Mapping[str, tuple[int, int]]
    kv_scales: KVScales | None = None
    origin: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class QuantizedWriter(Protocol):
    """One on-disk quantization format, bound to the layers of one model."""

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        ...

    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Further JSON files by name, such as ``quantize_config.json``."""
        ...

    def layout(self, layer: str, q: QuantizedArray) -> Mapping[str, TensorSpec]:
        """Full names of the tensors that ``tensors`` will return; cheap."""
        ...

    def tensors(self, layer: str, q: QuantizedArray) -> Mapping[str, np.ndarray]:
        """The tensors of one layer."""
        ...

    def extra(self) -> Mapping[str, np.ndarray]:
        """Tensors which belong to no linear layer, such as KV scales; small."""
        ...


WriterFactory = Callable[[Linears], QuantizedWriter]
"""Builds a writer, or raises ``CheckpointError`` naming the layer that the format cannot hold."""


@dataclass(frozen=True)
class Source:
    """One piece of the model: the tensors it becomes, and the function which makes them.

    Any thread may call the function, beside those of other pieces.
    """

    specs: Mapping[str, TensorSpec]
    make: Callable[[], Mapping[str, np.ndarray]]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


@contextmanager
def replacing_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside ``folder`` which takes its place at the end of the block.

    If the block raises, the temporary folder is removed and nothing has changed.

    Raises:
      CheckpointError: If ``folder`` exists, is not empty, and ``overwrite`` is not set.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} exists and is not a folder; choose another name")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not overwrite:
        raise CheckpointError(f"{folder} exists and is not empty; choose another, or overwrite it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        temporary.chmod(0o755)  # mkdtemp makes folders private
        yield temporary
        if occupied:
            # Two renames: no folder can be put in the place of one that is not empty.
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
            os.replace(folder, old)
            try:
                os.replace(temporary, folder)
            except OSError:
                os.replace(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(
    folder: Path, sources: list[Source], *, max_shard_bytes: int, advance: Callable[[], Any]
) -> None:
    """Write safetensors shards, and an index if there is more than one.

    Args:
      folder: Existing folder.
      sources: Pieces of the model; made a few at a time, written in this order.
      max_shard_bytes: Begin a new shard before one grows beyond this (a single tensor may).
      advance: Called after each piece.

    Raises:
      CheckpointError: If a name occurs twice, or a tensor does not match its spec.
    """
    shards = _assign(sources, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        index = {
            "metadata": {"total_size": sum(s.nbytes for shard in shards for s in shard.values())},
            "weight_map": dict(
                sorted((t, name) for name, shard in zip(names, shards, strict=True) for t in shard)
            ),
        }
        write_json(folder / INDEX_FILE, index)
    places = {}
    for name, shard in zip(names, shards, strict=True):
        for tensor, offset in _begin_shard(folder / name, shard).items():
            places[tensor] = (name, offset, shard[tensor])
    with Workers() as workers:
        every = workers.in_order(sources, lambda x: x.make(), lambda x: x.nbytes, _MOST_BYTES)
        for source, made in zip(sources, every, strict=True):
            _write(folder, source, made, places)
            del made  # else it would be held while the next is awaited
            advance()


def _write(
    folder: Path,
    source: Source,
    made: Mapping[str, np.ndarray],
    places: Mapping[str, tuple[str, int, TensorSpec]],
) -> None:
    if made.keys() != source.specs.keys():
        raise CheckpointError(f"planned {sorted(source.specs)}, made {sorted(made)}")
    for tensor, array in made.items():
        name, offset, spec = places[tensor]
        if array.dtype != spec.dtype or array.shape != spec.shape:
            raise CheckpointError(
                f"{tensor} was planned as {spec}, but is {array.dtype} {array.shape}"
            )
        if array.size:
            with (folder / name).open("r+b") as f:
                f.seek(offset)
                f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config, model card and licence."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as Hugging Face does: two spaces, a newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _assign(sources: list[Source], max_shard_bytes: int) -> list[dict[str, TensorSpec]]:
    if max_shard_bytes < 1:
        raise CheckpointError(f"{max_shard_bytes=} must be positive")
    shards: list[dict[str, TensorSpec]] = [{}]
    seen: set[str] = set()
    filled = 0
    for source in sources:
        for name, spec in source.specs.items():
            if name in seen:
                raise CheckpointError(f"tensor {name} would be written twice")
            if spec.dtype not in _NAMES:
                raise CheckpointError(f"tensor {name}: safetensors has no dtype {spec.dtype}")
            seen.add(name)
            if shards[-1] and filled + spec.nbytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = spec
            filled += spec.nbytes
    return shards


def _begin_shard(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Write the header and reserve the space; returns the offset of each tensor in the file."""
    # Wide types first, as the reference implementation does: every tensor is aligned to its items.
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    begin = 0
    for name in order:
        spec = specs[name]
        end = begin + spec.nbytes
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as f:
        f.write(len(header).to_bytes(8, "little"))
        f.write(header)
        f.truncate(8 + len(header) + begin)
    return {name: 8 + len(header) + entries[name]["data_offsets"][0] for name in order}
