"""Native checkpoints: parameters with ``QuantizedArray`` leaves exactly as qjax holds them.

For what no exchange format can hold, and for restoring onto several devices without converting:
each device receives its own part only. A folder holds

- ``config.json``, tokenizer and what else was copied from the source;
- ``qjax_checkpoint.json``: format of every parameter, the KV cache scales, checksums;
- ``params/``: the arrays, written by Orbax (OCDBT), 4-bit codes two to a byte.

Weights packed for kernels (``PackedWeight``) are kept as they are, with the version of their
layout. The folder appears whole or not at all. Nothing depends on the devices it was saved from.

References:
  https://orbax.readthedocs.io
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from qjax.checkpoints.checksums import check_files, file_sums, json_sum
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.hf import NATIVE_MANIFEST, LoadedModel, Place, load_tokenizer
from qjax.checkpoints.layout import model_leaves
from qjax.checkpoints.native_manifest import (
    PackingVersionError,
    abstract,
    describe,
    is_leaf,
    is_packed,
    kv_json,
    parts,
    rebuild,
)
from qjax.checkpoints.native_manifest import kv_scales as parse_kv_scales
from qjax.checkpoints.nibbles import PACKED, pack_nibbles, unpack_nibbles
from qjax.checkpoints.reader import KVScales
from qjax.checkpoints.safetensors_io import read_json
from qjax.checkpoints.writer import copy_companions, replacing_folder, write_json
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.sharding import leaf_spec
from qjax.quantize import path_string
from qjax.typing import DType, Params

MANIFEST = NATIVE_MANIFEST
_VERSION, _VERSION_PACKED = 1, 2
"""Version 2 holds packed weights and is else the same."""
_ARRAYS = "params"
# What reading an entry of a damaged manifest may raise.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def is_native(folder: str | Path) -> bool:
    """Whether a folder was written by ``save_native``."""
    return (Path(folder) / MANIFEST).exists()


def save_native(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    source: str | Path | None = None,
    kv_scales: KVScales | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model, atomically. 4-bit codes need room for a packed copy on their device.

    Args:
      folder: Where to; must not exist, or be empty, unless ``overwrite``.
      config: The model's configuration.
      params: Parameters of ``Decoder``, on any devices; kernels may be ``QuantizedArray``.
      source: Folder whose tokenizer, model card and generation config are copied along.
      kv_scales: Static KV cache scales to keep with the model.
      overwrite: Replace ``folder``.

    Raises:
      CheckpointError: If the folder is occupied or the parameters do not fit the config.
    """
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]
    values = {path_string(path): value for path, value in flat}
    entries = {path: describe(value) for path, value in values.items()}
    _check_paths(config, {path: value.shape for path, value in values.items()}, "the parameters")
    arrays: dict[tuple[str, ...], Any] = {}
    for path, value in values.items():
        for field, array in parts(value).items():
            arrays[(*path.split("/"), field)] = _pack(array)
    manifest = {
        "format": "qjax",
        "version": _VERSION_PACKED if any(map(is_packed, values.values())) else _VERSION,
        "params": entries,
        "kv_scales": None if kv_scales is None else kv_json(kv_scales),
    }
    with replacing_folder(Path(folder), overwrite=overwrite) as temporary:
        if source is not None:
            copy_companions(Path(source), temporary)
        write_json(temporary / "config.json", config.to_hf())
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary.resolve() / _ARRAYS, unflatten_dict(arrays))
        manifest["files"] = file_sums(temporary / _ARRAYS)
        write_json(temporary / MANIFEST, {**manifest, "checksum": json_sum(manifest)})


def load_native(
    folder: str | Path,
    *,
    dtype: DType | None = None,
    mesh: Mesh | None = None,
    axis: str = "model",
    place: Place | None = None,
) -> LoadedModel:
    """Read a model that ``save_native`` wrote.

    Args:
      folder: Its folder.
      dtype: Compute dtype; by default the one of config.json.
      mesh: Restore onto these devices, each of which receives its own part only.
      axis: The mesh axis to cut parameters along, as ``qjax.models.sharding`` does.
      place: Instead of ``mesh``: puts each parameter where it shall live. The arrays are read to
        the host first.

    Returns:
      The model; without ``mesh`` and ``place`` on the first device.

    Raises:
      CheckpointError: If files are missing, damaged, or do not fit each other.
      ValueError: If the mesh would cut groups that share a scale; see ``leaf_spec``.
    """
    if mesh is not None and place is not None:
        raise ValueError("give mesh or place, not both")
    folder = Path(folder)
    if not is_native(folder):
        raise CheckpointError(f"{folder} has no {MANIFEST}; it is no native qjax checkpoint")
    manifest = read_json(folder / MANIFEST)
    versions = (_VERSION, _VERSION_PACKED)
    if manifest.get("format") != "qjax" or manifest.get("version") not in versions:
        raise CheckpointError(
            f"{folder / MANIFEST}: format={manifest.get('format')!r} "
            f"version={manifest.get('version')!r}; this qjax reads versions 1 and 2"
        )
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    try:
        values = {path: abstract(entry) for path, entry in manifest["params"].items()}
        kv_scales = (
            None if manifest["kv_scales"] is None else parse_kv_scales(manifest["kv_scales"])
        )
    except PackingVersionError as e:
        raise CheckpointError(
            f"{folder / MANIFEST}: {e}. Load it with the version of qjax that wrote it, unpack the "
            "weights (qjax.ops.packed.unpack_tree, which is exact for what checkpoints hold) and "
            "save them again; unpacked weights have no such version"
        ) from e
    except _DAMAGE as e:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({e}); copy it again") from e
    shapes = {path: value.shape for path, value in values.items()}
    _check_paths(config, shapes, str(folder / MANIFEST))
    stored = {key: value for key, value in manifest.items() if key != "checksum"}
    if manifest.get("checksum") != json_sum(stored):
        raise CheckpointError(f"{folder / MANIFEST} is not as it was written; copy it again")
    check_files(folder / _ARRAYS, manifest.get("files"))
    tokenizer = load_tokenizer(folder)
    compute_dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    shardings = _shardings(values, config, mesh, axis)
    restored = _restore(folder, values, shardings, host=place is not None)
    params: dict[tuple[str, ...], Any] = {}
    for path, value in values.items():
        # Popped: the packed copy of each parameter goes as soon as the unpacked one is there.
        stored = restored.pop(path)
        full = {f: _unpack(stored[f], array) for f, array in parts(value).items()}
        result = rebuild(value, full)
        result = place(path, result) if place else jax.device_put(result, shardings[path])
        params[tuple(path.split("/"))] = _cast(path, result, compute_dtype)
    return LoadedModel(
        config=config,
        module=Decoder(config, dtype=compute_dtype),
        params=unflatten_dict(params),
        folder=folder,
        method="native",
        tokenizer=tokenizer,
        kv_scales=kv_scales,
    )


def _check_paths(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    wanted = {leaf.path: leaf.shape for leaf in model_leaves(config)}
    if wanted.keys() != shapes.keys():
        path = min(wanted.keys() ^ shapes.keys())
        raise CheckpointError(
            f"{what} do not fit the config: {path} is only in "
            f"{'the config' if path in wanted else what}"
        )
    for path, shape in shapes.items():
        if shape != wanted[path]:
            raise CheckpointError(f"{what}: {path} has shape {shape}, config needs {wanted[path]}")


def _packed(array: Any) -> bool:
    return str(jnp.dtype(array.dtype)) in PACKED and array.ndim > 0


def _stored(array: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and type under which an array is written."""
    if not _packed(array):
        return array.shape, array.dtype
    return (*array.shape[:-1], -(-array.shape[-1] // 2)), jnp.dtype(jnp.uint8)


def _pack(array: Any) -> Any:
    return pack_nibbles(array) if _packed(array) else array


def _unpack(stored: Any, array: jax.ShapeDtypeStruct) -> Any:
    if not _packed(array):
        return stored
    return unpack_nibbles(stored, array.shape[-1], str(array.dtype))


def _shardings(
    values: Mapping[str, Any], config: ModelConfig, mesh: Mesh | None, axis: str
) -> dict[str, Any]:
    """Target of every parameter; ``QuantizedArray`` of shardings for quantized ones."""
    if mesh is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        return {path: jax.tree.map(lambda _: one, value) for path, value in values.items()}
    named: Callable[[Any], Any] = functools.partial(NamedSharding, mesh)
    devices = mesh.shape[axis]
    return {
        path: jax.tree.map(
            named,
            leaf_spec(path, value, config, devices, axis),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        for path, value in values.items()
    }


def _restore(
    folder: Path, values: Mapping[str, Any], shardings: Mapping[str, Any], *, host: bool
) -> dict[str, dict[str, Any]]:
    """Arrays as stored, by path and field."""
    target: dict[tuple[str, ...], Any] = {}
    for path, value in values.items():
        places = parts(shardings[path])
        for field, array in parts(value).items():
            shape, dtype = _stored(array)
            key = (*path.split("/"), field)
            if host:
                target[key] = np.empty(shape, dtype)
            else:
                sharding = _legal(places[field], shape)
                target[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(folder.resolve() / _ARRAYS, unflatten_dict(target))
    # Whatever is wrong with the files, Orbax and TensorStore have their own exceptions for it.
    except Exception as e:
        raise CheckpointError(
            f"{folder / _ARRAYS} cannot be read ({type(e).__name__}: {str(e)[:300]}); copy the "
            "checkpoint again"
        ) from e
    restored: dict[str, dict[str, Any]] = {path: {} for path in values}
    for key, array in flatten_dict(arrays).items():
        restored["/".join(key[:-1])][key[-1]] = array
    return restored


def _legal(sharding: Any, shape: tuple[int, ...]) -> Any:
    """The sharding, or a whole copy per device where it does not divide a packed axis."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _cast(path: str, value: Any, dtype: Any) -> Any:
    """To the compute dtype; norm weights stay as they are."""
    if is_leaf(value) or not path.endswith("/weight"):
        return value if value.dtype == dtype else value.astype(dtype)
    return value
