"""Which tensors a decoder needs: names, shapes, and the check of a checkpoint's headers."""

from __future__ import annotations

import functools
import re
from collections.abc import Container
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import ExpectedTensor, QuantizedReader
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint
from qjax.formats import QuantFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.quantize import path_string

HEAD = "lm_head/kernel"
"""Parameter path of the output projection, which models with a tied embedding do not have."""

_FLOAT_DTYPES = ("F32", "F16", "BF16")

# Derived from the config, stored by old versions of transformers.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Leaf:
    """One parameter: its path in the tree, its shape there, and its name in the checkpoint.

    ``alias`` is a second name under which the tensor may stand, or ``name`` again: a tied embedding
    is stored as ``lm_head.weight`` by some writers.
    """

    path: str
    shape: tuple[int, ...]
    name: str
    alias: str

    @property
    def is_kernel(self) -> bool:
        """Whether it is the matrix of a linear layer; the checkpoint holds it transposed."""
        return self.path.endswith("/kernel")

    @property
    def is_norm(self) -> bool:
        return self.path.endswith("/weight")

    @property
    def layer(self) -> str:
        """Checkpoint name of the module it belongs to."""
        return self.name.rpartition(".")[0]

    def stored_name(self, names: Container[str]) -> str:
        """The name under which a checkpoint with these names holds it; ``name`` if none does."""
        return self.alias if self.alias in names and self.name not in names else self.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the plain tensor in the checkpoint."""
        return self.shape[::-1] if self.is_kernel else self.shape


def hf_name(path: str) -> str:
    """Checkpoint name of a parameter: ``model/layers_0/mlp/up_proj/kernel`` is stored as
    ``model.layers.0.mlp.up_proj.weight``.
    """
    module, _, leaf = path.rpartition("/")
    module = re.sub(r"\blayers_(\d+)\b", r"layers.\1", module.replace("/", "."))
    return f"{module}.{'bias' if leaf == 'bias' else 'weight'}"


def head_rules(config: ModelConfig, fmt: QuantFormat | None) -> dict[str, QuantFormat] | None:
    """``rules`` of ``load_model`` by which the output projection is quantized too.

    Args:
      config: The model.
      fmt: Format of ``lm_head``; None leaves it as it is.

    Returns:
      The rules, or None.

    Raises:
      ValueError: If the model has no ``lm_head`` of its own.
    """
    if fmt is None:
        return None
    if config.tie_word_embeddings:
        raise ValueError(
            f"lm_head cannot be quantized to {fmt.name}: this model has none of its own, its "
            "embedding is the output projection too (tie_word_embeddings) and is not quantized; "
            "leave the format of lm_head out"
        )
    return {HEAD: fmt}


@functools.cache
def model_leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """All parameters of a decoder, in the order of its computation as far as the tree keeps it."""
    module = Decoder(config)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    leaves = []
    for key_path, value in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        path = path_string(key_path)
        tied = config.tie_word_embeddings and path == "model/embed_tokens/embedding"
        name = hf_name(path)
        leaves.append(Leaf(path, value.shape, name, "lm_head.weight" if tied else name))
    return tuple(leaves)


def check_tensors(
    config: ModelConfig,
    leaves: tuple[Leaf, ...],
    checkpoint: SafetensorsCheckpoint,
    reader: QuantizedReader | None,
) -> None:
    """Compare the headers with what the model needs: presence, shape, dtype, nothing left over.

    Raises:
      CheckpointError: At the first difference; names the tensor, both sides, and what to do.
    """
    expected: dict[str, ExpectedTensor] = {}
    for leaf in leaves:
        if leaf.is_kernel and reader is not None and reader.is_quantized(leaf.layer):
            k, n = leaf.shape
            expected.update(reader.expected(leaf.layer, (k, n)))
        else:
            expected[leaf.stored_name(checkpoint)] = ExpectedTensor(
                leaf.stored_shape, _FLOAT_DTYPES
            )

    spare = set() if reader is None else set(reader.kv_scale_names(config.num_layers))
    extra = [n for n in checkpoint if n not in expected and n not in spare]
    extra = [n for n in extra if not _is_harmless(n, config, checkpoint, reader)]
    missing = [n for n in expected if n not in checkpoint]
    if missing:
        hint = f"; it holds {len(extra)} unknown ones instead, such as {extra[0]}" if extra else ""
        if missing == ["lm_head.weight"]:
            hint = "; if the embedding is tied, config.json must say tie_word_embeddings: true"
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of {len(expected)} tensors, such as "
            f"{missing[0]}{hint}; check that config.json belongs to these weights and that all "
            "shards are there"
        )
    for name, want in expected.items():
        have = checkpoint.tensors[name]
        if want.shape is not None and have.shape != want.shape:
            raise CheckpointError(
                f"{have.file}: tensor {name} has shape {have.shape}, the model needs {want.shape}; "
                "check that config.json belongs to these weights"
            )
        if have.dtype not in want.dtypes:
            raise CheckpointError(
                f"{have.file}: tensor {name} has dtype {have.dtype}, needed is "
                f"{' or '.join(want.dtypes)}"
            )
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(extra)} tensors that the model of its config.json "
            "does "
            f"not use, such as {extra[0]}; it would not compute what it was trained to. Check that "
            "config.json belongs to these weights"
        )


def _is_harmless(
    name: str,
    config: ModelConfig,
    checkpoint: SafetensorsCheckpoint,
    reader: QuantizedReader | None,
) -> bool:
    if _IGNORED.fullmatch(name):
        return True
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return _same_as_embedding(checkpoint)
    if name.endswith(".bias") and reader is not None:
        # Quantizers of the AutoGPTQ line write a bias of zeros for layers that have none.
        return reader.is_quantized(name.removesuffix(".bias")) and not np.any(checkpoint[name])
    return False


def _same_as_embedding(checkpoint: SafetensorsCheckpoint) -> bool:
    """A tied model may store both matrices, if they are equal; otherwise one would be lost."""
    first, second = checkpoint["model.embed_tokens.weight"], checkpoint["lm_head.weight"]
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    # In strips of rows, as bytes: no second copy of a large vocabulary, and NaN equals itself.
    rows = max(1, 2**24 // max(1, first[:1].nbytes))
    for i in range(0, first.shape[0], rows):
        a, b = first[i : i + rows], second[i : i + rows]
        if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return False
    checkpoint.release()
    return True
