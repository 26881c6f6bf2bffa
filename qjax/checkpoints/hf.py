"""Load Hugging Face checkpoints tensor by tensor, quantizing each one as it arrives.

Order of work: config, headers and tokenizer are read and checked first, so that every mistake in
the files is found before a weight is touched. Then each tensor is mapped, converted or quantized on
its way to the device (``arrival``), and its pages are released. A few are on their way at once
(``pipeline``), but never more than the largest tensor, or two of the others, together: that bounds
what the host holds beside the result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from tqdm import tqdm

from qjax.checkpoints.arrival import Each, plain_parameter, quantized_parameter, stored_parameter
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.layout import HEAD, Leaf, check_tensors, model_leaves
from qjax.checkpoints.pipeline import Workers
from qjax.checkpoints.quantized import find_reader
from qjax.checkpoints.reader import GetTensor, KVScales, QuantizedReader
from qjax.checkpoints.safetensors_io import SafetensorsCheckpoint, read_json
from qjax.formats import QuantFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.sharding import leaf_spec, placer
from qjax.quantize import match_rules, quantize
from qjax.tokenizer import Tokenizer

NATIVE_MANIFEST = "qjax_checkpoint.json"
"""What a folder written by ``qjax.checkpoints.native`` has and others do not."""

_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")

Rules = Mapping[str, QuantFormat | None]
Place = Callable[[str, Any], Any]
"""Parameter path and value to the value on the devices where it shall live."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: ``module.apply({"params": params}, tokens, ...)``.

    Attributes:
      config: What was read from config.json.
      module: The decoder in the compute dtype.
      params: Parameters; kernels may be ``QuantizedArray``.
      folder: Where the checkpoint lies.
      method: How its weights were quantized in the file (the reader's name), or None.
      tokenizer: None where the folder has no tokenizer.json.
      kv_scales: Static KV cache scales of the checkpoint, or None.
    """

    config: ModelConfig
    module: Decoder
    params: dict[str, Any]
    folder: Path
    method: str | None
    tokenizer: Tokenizer | None
    kv_scales: KVScales | None

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          CheckpointError: If the folder has none.
        """
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.folder} has no tokenizer.json; download it, or convert tokenizer.model "
                "with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        return self.tokenizer


def load_model(
    path: str | Path,
    *,
    quantization: QuantFormat | None = None,
    skip: str | None = None,
    rules: Rules | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    axis: str = "model",
    place: Place | None = None,
    ignore_keys: Collection[str] = (),
    revision: str | None = None,
    progress: bool = True,
) -> LoadedModel:
    """Load a checkpoint folder or a model of the Hugging Face hub.

    Args:
      path: Folder (of a native checkpoint too), or a hub id such as ``"Qwen/Qwen3-8B"``, which is
        downloaded and cached.
      quantization: Format for the kernels of all linear layers but ``lm_head``; None keeps them.
      skip: Regular expression on parameter paths (``model/layers_0/mlp/down_proj/kernel``, matched
        in full) of kernels to leave as they are, beyond ``lm_head``.
      rules: Regular expression on parameter paths to the format of those kernels, or None to leave
        them; the first match wins, before ``quantization``. The way to quantize ``lm_head`` too. Of
        a checkpoint that is quantized already they may name what it stores unquantized, which most
        often is ``lm_head``.
      dtype: Compute dtype, and type of what is not quantized (norm weights stay float32); by
        default the one the checkpoint was saved in.
      mesh: Cut each parameter over these devices as soon as it is read; see
        ``qjax.models.sharding``. By default everything is on the default device.
      axis: The mesh axis to cut along.
      place: Instead of ``mesh``: puts each parameter where it shall live.
      ignore_keys: Unknown keys of config.json which do not change the computation.
      revision: Branch, tag or commit on the hub.
      progress: Show a progress bar on standard error.

    Returns:
      The model. A checkpoint that is quantized already keeps its stored codes and scales, a native
      one every parameter as it was saved.

    Raises:
      CheckpointError: If files are missing, damaged or do not fit the config; before weights are
        read.
      ValueError: If the config asks for something not implemented, a rule matches nothing or a
        layer that is stored quantized, ``quantization`` or ``skip`` is given for a checkpoint that
        is quantized already, any of the three for a native one, or the mesh would cut groups that
        share a scale.
    """
    if mesh is not None and place is not None:
        raise ValueError("give mesh or place, not both")
    folder = resolve_folder(path, revision)
    if (folder / NATIVE_MANIFEST).exists():
        given = _given(quantization, skip, rules)
        if given:
            raise ValueError(
                f"{folder} is a native checkpoint, its parameters keep the formats they were saved "
                f"in; load it without {given[0]}, or save it again with such formats "
                "(qjax.quantize_tree before save_native)"
            )
        # Here, because it builds on this module and importing Orbax takes a second.
        from qjax.checkpoints.native import load_native

        return load_native(folder, dtype=dtype, mesh=mesh, axis=axis, place=place)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json; download it beside the weights")
    raw_config = read_json(folder / "config.json")
    config = ModelConfig.from_hf(raw_config, ignore_keys=ignore_keys)
    config = _with_generation_config(folder, config)
    checkpoint = SafetensorsCheckpoint(folder)
    reader = find_reader(folder, raw_config, checkpoint.tensors)
    leaves = model_leaves(config)
    check_tensors(config, leaves, checkpoint, reader)
    formats = _choose_formats(leaves, reader, quantization, skip, rules)
    tokenizer = load_tokenizer(folder)
    compute_dtype = _compute_dtype(config, dtype)
    if mesh is not None:
        _check_cuts(leaves, formats, config, mesh.shape[axis])
        place = placer(config, mesh, axis)
    elif place is None:
        place = _keep

    workers = Workers()

    def read(leaf: Leaf) -> Any:
        touched: list[str] = []

        def get(name: str) -> np.ndarray:
            touched.append(name)
            return checkpoint[name]

        fmt = formats.get(leaf.path)
        value = _read_leaf(leaf, get, checkpoint, reader, fmt, compute_dtype, workers.each)
        jax.block_until_ready(value)
        checkpoint.release(touched)
        return value

    sizes = {leaf: _stored_bytes(leaf, checkpoint) for leaf in leaves}
    params: dict[tuple[str, ...], Any] = {}
    bar = tqdm(
        total=len(leaves), desc=f"loading {folder.name}", disable=not progress, unit="tensor"
    )
    with bar, workers:
        values = workers.in_order(leaves, read, sizes.__getitem__, _limit(sizes.values()))
        for leaf, value in zip(leaves, values, strict=True):
            # One at a time: without waiting, jax would queue them and keep all their inputs.
            params[tuple(leaf.path.split("/"))] = jax.block_until_ready(place(leaf.path, value))
            bar.update()
    scales = None
    if reader is not None:
        scales = reader.kv_scales(checkpoint.__getitem__, config.num_layers, config.num_kv_heads)
    return LoadedModel(
        config=config,
        module=Decoder(config, dtype=compute_dtype),
        params=unflatten_dict(params),
        folder=folder,
        method=None if reader is None else reader.name,
        tokenizer=tokenizer,
        kv_scales=scales,
    )


def stored_method(folder: Path) -> str | None:
    """How the weights in a folder are quantized: ``LoadedModel.method``, from the headers alone.

    Raises:
      CheckpointError: If files are missing, or quantized in a way that no reader takes.
    """
    if (folder / NATIVE_MANIFEST).exists():
        return "native"
    tensors = SafetensorsCheckpoint(folder).tensors
    reader = find_reader(folder, read_json(folder / "config.json"), tensors)
    return None if reader is None else reader.name


def resolve_folder(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a path or hub id, downloading it if needed.

    Raises:
      CheckpointError: If it is neither a folder nor a model that can be downloaded.
    """
    if not str(path):  # would be the current folder
        raise CheckpointError("the model's name is empty; give a folder or a hub id")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder of the checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise CheckpointError(f"{path} does not exist; give a folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(path),
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                # The same weights once more, in the layouts of Mistral's and Meta's own code.
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except Exception as e:  # the hub client raises types of its own, of requests and of httpx
        raise CheckpointError(
            f"{path} is no local folder and could not be downloaded from the Hugging Face hub "
            f"({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}); check "
            "the "
            "name and the network, log in for gated models, or download it elsewhere"
        ) from e


def _keep(path: str, value: Any) -> Any:
    del path
    return value


def _compute_dtype(config: ModelConfig, dtype: Any) -> Any:
    name = str(config.dtype if dtype is None else jnp.dtype(dtype))
    if name not in _COMPUTE_DTYPES:
        where = "dtype of config.json" if dtype is None else "dtype"
        raise ValueError(f"{where} is {name!r}; pass dtype= one of {', '.join(_COMPUTE_DTYPES)}")
    return jnp.dtype(name)


def check_cuts(
    config: ModelConfig,
    devices: int,
    quantization: QuantFormat | None,
    skip: str | None,
    rules: Rules | None = None,
) -> None:
    """Raise what ``load_model`` over so many devices would raise about layers that it quantizes.

    Args:
      config: The model.
      devices: Size of the mesh axis.
      quantization: As of ``load_model``.
      skip: As of ``load_model``.
      rules: As of ``load_model``.

    Raises:
      ValueError: If a layer cannot be cut, or a shard would cut a group.
    """
    leaves = model_leaves(config)
    formats = _choose_formats(leaves, None, quantization, skip, rules)
    _check_cuts(leaves, formats, config, devices)


def _check_cuts(
    leaves: tuple[Leaf, ...],
    formats: Mapping[str, QuantFormat | None],
    config: ModelConfig,
    devices: int,
) -> None:
    """Raise for a layer that cannot be cut, before weights are read."""
    for leaf in leaves:
        value: Any = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        fmt = formats.get(leaf.path)
        if fmt is not None:
            value = jax.eval_shape(functools.partial(quantize, fmt=fmt), value)
        leaf_spec(leaf.path, value, config, devices)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint, or None.

    Raises:
      CheckpointError: If there is a file and it is no tokenizer.
    """
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        return Tokenizer.from_folder(folder)
    except ValueError as e:
        raise CheckpointError(str(e)) from e


def _with_generation_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """Chat models list all ids that end a turn in generation_config.json only."""
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        return config
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(ids)))


def _choose_formats(
    leaves: tuple[Leaf, ...],
    reader: QuantizedReader | None,
    quantization: QuantFormat | None,
    skip: str | None,
    rules: Rules | None,
) -> dict[str, QuantFormat | None]:
    given = _given(quantization, skip, None)
    if reader is not None and given:
        raise ValueError(
            f"the checkpoint is quantized already ({reader.name}); load it without {given[0]}, or "
            "load the unquantized checkpoint"
        )
    if skip is not None and quantization is None and not rules:
        raise ValueError(f"{skip=} without a quantization leaves nothing to skip; give both")
    ordered: dict[str, QuantFormat | None] = {}
    if skip is not None:
        ordered[skip] = None
    for pattern, fmt in (rules or {}).items():
        ordered.setdefault(pattern, fmt)
    kernels = [leaf.path for leaf in leaves if leaf.is_kernel]
    if quantization is not None:
        if HEAD in kernels:
            ordered.setdefault(HEAD, None)
        ordered.setdefault(".*/kernel", quantization)
    formats = match_rules(kernels, ordered)
    if reader is not None:
        _refuse_stored([leaf for leaf in leaves if leaf.path in formats], reader)
    return formats


def _given(quantization: QuantFormat | None, skip: str | None, rules: Rules | None) -> list[str]:
    """Which of the arguments are given, in words."""
    asked = {
        "quantization": quantization,
        "skip": skip,
        f"rules for {', '.join(rules or ())}": rules or None,
    }
    return [name for name, value in asked.items() if value is not None]


def _refuse_stored(leaves: list[Leaf], reader: QuantizedReader) -> None:
    """Raise if a rule matches a layer whose codes are in the checkpoint."""
    stored = [leaf.path for leaf in leaves if reader.is_quantized(leaf.layer)]
    if stored:
        more = len(stored) - 1
        raise ValueError(
            f"a rule matches {stored[0]}{f' and {more} more layers' if more else ''}, which the "
            f"checkpoint stores quantized already ({reader.name}); leave what it stores quantized "
            "out of the rules, it is kept as it is, or load the unquantized checkpoint"
        )


def _stored_bytes(leaf: Leaf, checkpoint: SafetensorsCheckpoint) -> int:
    info = checkpoint.tensors.get(leaf.stored_name(checkpoint))
    # At most two bytes for each code of a quantized layer, with what unpacking takes.
    return 2 * math.prod(leaf.shape) if info is None else info.nbytes


def _limit(sizes: Iterable[int]) -> int:
    """Bytes of tensors that may be on their way at once: the largest, or two of the others.

    Embedding and output layer are often far larger than all others.
    """
    ordered = sorted(sizes, reverse=True)
    return max(ordered[0], 2 * ordered[min(2, len(ordered) - 1)])


def _read_leaf(
    leaf: Leaf,
    get: GetTensor,
    names: Container[str],
    reader: QuantizedReader | None,
    fmt: QuantFormat | None,
    dtype: Any,
    each: Each,
) -> Any:
    """One parameter, on the default device."""
    if leaf.is_kernel and reader is not None and reader.is_quantized(leaf.layer):
        k, n = leaf.shape
        value = reader.read(leaf.layer, get, (k, n), dtype)
        if value.shape != leaf.shape:
            raise CheckpointError(
                f"{reader.name}: {leaf.layer} was read as {value.shape}, the model needs "
                f"{leaf.shape}"
            )
        return stored_parameter(value, each=each)
    array = get(leaf.stored_name(names))
    if fmt is not None:
        # From the stored dtype, not from the compute dtype: one rounding fewer.
        return quantized_parameter(array, fmt, dtype, each=each)
    dtype = jnp.float32 if leaf.is_norm else dtype
    return plain_parameter(array, dtype, transpose=leaf.is_kernel, each=each)
