"""Save a model in a format that other engines read: vLLM, SGLang, Hugging Face transformers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from qjax.checkpoints.awq_writer import AwqWriter
from qjax.checkpoints.ct_writer import CompressedTensorsWriter
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.fp8_writer import Fp8Writer
from qjax.checkpoints.gptq_writer import GptqWriter
from qjax.checkpoints.layout import Leaf, model_leaves
from qjax.checkpoints.reader import KVScales
from qjax.checkpoints.safetensors_io import DTYPES, SafetensorsCheckpoint, read_headers, read_json
from qjax.checkpoints.writer import (
    Linears,
    QuantizedWriter,
    Source,
    TensorSpec,
    WriterFactory,
    copy_companions,
    replacing_folder,
    write_json,
    write_tensors,
)
from qjax.models.config import ModelConfig
from qjax.quantize import is_quantized, path_string
from qjax.typing import Params

EXPORT_FORMATS: dict[str, WriterFactory | None] = {
    "none": None,
    "awq": AwqWriter,
    "compressed-tensors": CompressedTensorsWriter,
    "fp8": Fp8Writer,
    "gptq": GptqWriter,
}
"""Names of the command line; ``none`` writes a plain checkpoint."""


def save_model(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    format: str | WriterFactory,
    *,
    source: str | Path | None = None,
    kv_scales: KVScales | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write a model folder, atomically: it appears whole or not at all.

    Args:
      folder: Where to; must not exist, or be empty, unless ``overwrite``.
      config: The model's configuration.
      params: Parameters of ``Decoder``; kernels may be ``QuantizedArray``.
      format: A key of ``EXPORT_FORMATS``, or the writer of one with options bound, such as
        ``functools.partial(GptqWriter, checkpoint_format="gptq_v2")``.
      source: Folder which the model came from: its tokenizer, model card and generation config are
        copied along, and tensors which are not quantized are written in the type they have there
        if that loses nothing.
      kv_scales: Static KV cache scales to store, in formats which have a place for them.
      max_shard_bytes: Size at which a new shard begins.
      overwrite: Replace ``folder``.
      progress: Show a progress bar on standard error.

    Raises:
      CheckpointError: If the format cannot hold the model exactly (names the layer and the
        reason), or the folder is occupied. Nothing has been written then.
    """
    leaves = _check_params(config, params)
    origin = None if source is None else Path(source)
    tensors = {} if origin is None else SafetensorsCheckpoint(origin)
    writer = _make_writer(format, leaves, kv_scales, tensors)
    stored = _stored_dtypes(origin, config)
    sources = [_source(leaf, value, writer, stored(leaf)) for leaf, value in leaves]
    if writer is not None and (extra := dict(writer.extra())):
        specs = {name: TensorSpec(array.dtype, array.shape) for name, array in extra.items()}
        sources.append(Source(specs, lambda: extra))
    values = _config_values(config, origin)
    if writer is not None:
        values["quantization_config"] = writer.config()
    with replacing_folder(Path(folder), overwrite=overwrite) as temporary:
        if origin is not None:
            copy_companions(origin, temporary)
        write_json(temporary / "config.json", values)
        for name, content in (writer.files() if writer is not None else {}).items():
            write_json(temporary / name, content)
        label = f"writing {Path(folder).name}"
        with tqdm(total=len(sources), desc=label, disable=not progress, unit="tensor") as bar:
            write_tensors(temporary, sources, max_shard_bytes=max_shard_bytes, advance=bar.update)


def check_storable(config: ModelConfig, params: Params, format: str | WriterFactory) -> None:
    """Finds out without writing whether ``save_model`` could write this.

    Args:
      config: The model's configuration.
      params: As for ``save_model``; values may be any, such as those before training.
      format: As for ``save_model``.

    Raises:
      CheckpointError: If the format cannot hold the model; names the layer and the reason.
    """
    leaves = _check_params(config, params)
    writer = _make_writer(format, leaves, None, {})
    for leaf, value in leaves:
        if writer is not None and is_quantized(value):
            writer.layout(leaf.layer, value)


def _check_params(config: ModelConfig, params: Params) -> list[tuple[Leaf, Any]]:
    """All parameters in the order of ``model_leaves``."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
    values = {path_string(path): value for path, value in flat}
    leaves = model_leaves(config)
    wanted = {leaf.path: leaf for leaf in leaves}
    if values.keys() != wanted.keys():
        difference = sorted(values.keys() ^ wanted.keys())
        raise CheckpointError(
            f"the parameters do not fit the config: {difference[0]} is only in the "
            f"{'parameters' if difference[0] in values else 'config'} ({len(difference)} differ)"
        )
    for path, value in values.items():
        if value.shape != wanted[path].shape:
            raise CheckpointError(
                f"{path} has shape {value.shape}, its config says {wanted[path].shape}"
            )
    return [(leaf, values[leaf.path]) for leaf in leaves]


def _make_writer(
    format: str | WriterFactory,
    leaves: list[tuple[Leaf, Any]],
    kv_scales: KVScales | None,
    origin: Mapping[str, np.ndarray],
) -> QuantizedWriter | None:
    if isinstance(format, str):
        if format not in EXPORT_FORMATS:
            raise CheckpointError(f"unknown {format=}; choose one of {', '.join(EXPORT_FORMATS)}")
        factory = EXPORT_FORMATS[format]
    else:
        factory = format
    quantized = {leaf.layer: value for leaf, value in leaves if is_quantized(value)}
    for leaf, value in leaves:
        if is_quantized(value) and not leaf.is_kernel:
            raise CheckpointError(f"{leaf.path} is quantized; only linear layers can be stored so")
    if factory is not None and quantized:
        plain = {
            leaf.layer: (leaf.shape[0], leaf.shape[1])
            for leaf, value in leaves
            if leaf.is_kernel and leaf.layer not in quantized
        }
        return factory(Linears(quantized, plain, kv_scales, origin))
    if factory is not None:
        raise CheckpointError(f"{format=} but no layer is quantized; use format='none'")
    if quantized or kv_scales is not None:
        what = next(iter(quantized), "the KV cache scales")
        raise CheckpointError(f"format='none' has no place for {what}, which is quantized")
    return None


def _source(
    leaf: Leaf, value: Any, writer: QuantizedWriter | None, stored: np.dtype | None
) -> Source:
    if is_quantized(value):
        assert writer is not None
        make = functools.partial(writer.tensors, leaf.layer, value)
        return Source(writer.layout(leaf.layer, value), make)
    dtype = np.dtype(value.dtype)
    if stored is not None and stored != dtype and stored.itemsize <= dtype.itemsize:
        host = np.asarray(value)
        if np.array_equal(host.astype(stored).astype(dtype), host):
            dtype = stored

    def make_plain() -> dict[str, np.ndarray]:
        host = np.asarray(value)
        return {leaf.name: (host.T if leaf.is_kernel else host).astype(dtype)}

    return Source({leaf.name: TensorSpec(dtype, leaf.stored_shape)}, make_plain)


def _stored_dtypes(origin: Path | None, config: ModelConfig) -> Callable[[Leaf], np.dtype | None]:
    """Type that a plain tensor had on disk: norms are loaded as float32, whatever they were."""
    tensors = {} if origin is None else read_headers(origin)

    def stored(leaf: Leaf) -> np.dtype | None:
        info = tensors.get(leaf.stored_name(tensors))
        if info is not None:
            return DTYPES[info.dtype]
        return np.dtype(jax.numpy.dtype(config.dtype))

    return stored


def _config_values(config: ModelConfig, origin: Path | None) -> dict[str, Any]:
    """config.json: the source's own keys where they describe this model."""
    values = config.to_hf()
    if origin is not None and (origin / "config.json").exists():
        original: Mapping[str, Any] = read_json(origin / "config.json")
        try:
            same = ModelConfig.from_hf(original)
        except ValueError:  # keys which the caller chose to ignore when loading
            return values
        # End-of-sequence ids may have been completed from generation_config.json.
        if dataclasses.replace(same, eos_token_ids=config.eos_token_ids) == config:
            values = {k: v for k, v in original.items() if k != "quantization_config"}
            values.pop("compression_config", None)  # its name in old compressed-tensors files
    return values
