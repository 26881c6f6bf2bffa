"""The model to calibrate, read from its checkpoint piece by piece, rotated if asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.calibrate.linears import get_at
from qjax.calibration.rotation import (
    random_hadamard,
    rotate_block,
    rotate_embedding,
    rotate_inputs,
)
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.layout import HEAD, Leaf, check_tensors, model_leaves
from qjax.checkpoints.quantized import find_reader
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint, read_json
from qjax.models.config import ModelConfig
from qjax.typing import Array

EMBEDDING = "model/embed_tokens/embedding"
NORM = "model/norm/weight"


class ModelSource:
    """An unquantized checkpoint, as the model that will be quantized.

    With ``rotated`` that is the model in a rotated residual stream (``calibration.rotation``): it
    computes the same with other weights, and its output projection is never tied.

    Args:
      folder: Folder of an unquantized Hugging Face checkpoint.
      rotated: Whether to rotate.

    Attributes:
      config: Configuration of the model that is read.
      leaves: Its parameters.

    Raises:
      CheckpointError: If the checkpoint is damaged, or quantized already.
    """

    def __init__(self, folder: Path, *, rotated: bool = False):
        raw = read_json(folder / "config.json")
        original = ModelConfig.from_hf(raw)
        self._checkpoint = SafetensorsCheckpoint(folder)
        reader = find_reader(folder, raw, self._checkpoint.tensors)
        if reader is not None:
            raise CheckpointError(
                f"{folder} is quantized already ({reader.name}); calibrate the original checkpoint"
            )
        self._stored = {leaf.path: leaf for leaf in model_leaves(original)}
        check_tensors(original, tuple(self._stored.values()), self._checkpoint, None)
        self._residual = random_hadamard(original.hidden_size) if rotated else None
        self._heads = random_hadamard(original.head_dim, seed=1) if rotated else None
        tied = original.tie_word_embeddings and not rotated
        self.config = dataclasses.replace(original, tie_word_embeddings=tied)
        self.leaves = model_leaves(self.config)

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted({info.file for info in self._checkpoint.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Size of the weights as they are stored."""
        names = {leaf.stored_name(self._checkpoint) for leaf in self._stored.values()}
        return sum(self._checkpoint.tensors[name].nbytes for name in names)

    def block(self, index: int, wide: Container[str] = ()) -> dict[str, Any]:
        """The parameters of one decoder block.

        Args:
          index: Which.
          wide: Paths that stay float32 if they are rotated, because they will be quantized; all
            other parameters have the type they are stored in.
        """
        prefix = f"model/layers_{index}/"
        params: dict[str, Any] = {}
        for leaf in self.leaves:
            if leaf.path.startswith(prefix):
                insert(params, leaf.path.removeprefix(prefix), self._read(leaf.path))
        self._checkpoint.release()
        if self._residual is None:
            return params
        narrow, params = params, rotate_block(params, self._residual, self._heads)
        for leaf in self.leaves:
            if leaf.path.startswith(prefix) and leaf.path not in wide:
                path = leaf.path.removeprefix(prefix)
                insert(params, path, get_at(params, path).astype(get_at(narrow, path).dtype))
        return params

    def outer(self, path: str, wide: Container[str] = ()) -> Array:
        """A parameter outside the blocks; ``wide`` as for ``block``."""
        if self._residual is None:
            return self._read(path)
        tied = path == HEAD and HEAD not in self._stored
        value = self._read(EMBEDDING if tied else path)
        if path == NORM:
            return jnp.ones_like(value)
        if path == EMBEDDING:
            rotated = rotate_embedding(value, self._residual)
        else:
            assert path == HEAD, path
            kernel = value.T if tied else value
            rotated = rotate_inputs(kernel, self._read(NORM), self._residual)
        return rotated if path in wide else rotated.astype(value.dtype)

    def outer_view(self, path: str) -> np.ndarray:
        """The same in the stored type on the host, without a copy where nothing is rotated."""
        if self._residual is not None:
            return np.asarray(self.outer(path))
        return self._view(self._stored[path])

    def _view(self, leaf: Leaf) -> np.ndarray:
        array = self._checkpoint[leaf.stored_name(self._checkpoint)]
        return array.T if leaf.is_kernel else array

    def _read(self, path: str) -> Array:
        leaf = self._stored[path]
        # Copied: on CPU jax would otherwise keep a view of the mapped file. Transposed behind the
        # transfer: a GPU does that in no time.
        array = jnp.array(self._checkpoint[leaf.stored_name(self._checkpoint)], copy=True)
        return array.T if leaf.is_kernel else array


def insert(tree: dict[str, Any], path: str, value: Any) -> None:
    """Put a value at a slash-separated path."""
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
