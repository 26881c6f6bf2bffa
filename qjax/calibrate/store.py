"""Finished blocks on disk, so that an interrupted run goes on where it was.

One folder per run holds ``run.json`` (everything that decides the result) and one safetensors
folder per finished block, each put in its place by a rename. Arrays come back as views of the
files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from qjax._files import write_text_atomic
from qjax.checkpoints.safetensors_io import DTYPES, SafetensorsCheckpoint, read_json
from qjax.checkpoints.writer import Source, TensorSpec, replacing_folder, write_json, write_tensors
from qjax.formats import QuantFormat
from qjax.quantize import is_quantized, path_string
from qjax.quantized_array import QuantizedArray

_FIELDS = ("qvalue", "scale", "zero_point", "act_scale")
# Types safetensors has no name for; one byte per element in memory, so a view does.
_AS_BYTES = (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.float4_e2m1fn))


class BlockStore:
    """Finished pieces of one run under ``folder``.

    Args:
      folder: Created if missing.
      run: What decides the result: plain JSON values.

    Raises:
      ValueError: If the folder belongs to a run with other values.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        values = json.loads(json.dumps(run))
        path = self.folder / "run.json"
        if path.exists():
            before = read_json(path)
            different = sorted(k for k in before.keys() | values if before.get(k) != values.get(k))
            if different:
                raise ValueError(
                    f"{self.folder} holds unfinished work with other {', '.join(different)}; "
                    "delete it to start anew, or choose another output"
                )
        else:
            write_text_atomic(path, json.dumps(values, indent=2) + "\n")

    def has(self, name: str) -> bool:
        """Whether a piece is finished."""
        return (self.folder / name).is_dir()

    def record(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """JSON values which are made once and then kept."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_text_atomic(path, json.dumps(make(), indent=2) + "\n")
        return read_json(path)

    def save(self, name: str, params: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write a piece: nested parameters, and JSON values that belong to it."""
        flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
        arrays: dict[str, np.ndarray] = {}
        for path, value in flat:
            for field, array in _parts(value).items():
                arrays[f"{path_string(path)}:{field}"] = _to_disk(np.asarray(array))
        specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
        with replacing_folder(self.folder / name, overwrite=True) as temporary:
            source = Source(specs, lambda: arrays)
            write_tensors(temporary, [source], max_shard_bytes=2**62, advance=lambda: None)
            write_json(temporary / "record.json", record)

    def load(
        self, name: str, formats: Mapping[str, QuantFormat | None], dtype: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A piece and its record.

        Args:
          name: As given to ``save``.
          formats: Format of every quantized leaf by its path in the piece.
          dtype: Result type of the quantized leaves.

        Returns:
          ``(params, record)``, host arrays.
        """
        folder = self.folder / name
        checkpoint = SafetensorsCheckpoint(folder)
        leaves: dict[str, dict[str, np.ndarray]] = {}
        for key in checkpoint:
            path, _, field = key.rpartition(":")
            leaves.setdefault(path, {})[field] = checkpoint[key]
        params: dict[str, Any] = {}
        for path, parts in leaves.items():
            node = params
            *parents, last = path.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = _from_disk(parts, formats.get(path), dtype)
        return params, read_json(folder / "record.json")


class BlockWriter:
    """Saves pieces of a store in a thread, so that the device can work on the next one meanwhile.

    At most one piece is being written, and none waits. To be used as a context manager: at its end
    everything is on disk and no thread is left. If the block raises, what was begun is still
    finished, so that a further run need not make it again.

    Args:
      store: Where to.
    """

    def __init__(self, store: BlockStore):
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="qjax-store")
        self._begun: Future[None] | None = None

    def save(self, name: str, params: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Begin to write a piece, arguments as of ``BlockStore.save``.

        Raises:
          Exception: What went wrong with the piece before; this one is not begun then.
        """
        self.finish()
        self._begun = self._pool.submit(self._store.save, name, params, record)

    def finish(self) -> None:
        """Wait until everything is on disk; raises what went wrong."""
        if self._begun is not None:
            self._begun.result()
            self._begun = None

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.finish()
            return
        failure = None if self._begun is None else self._begun.exception()
        if failure is not None and failure is not error:
            error.add_note(f"The block before could not be stored either: {failure!r}")


def _parts(value: Any) -> dict[str, Any]:
    if not is_quantized(value):
        return {"value": value}
    fields = {field: getattr(value, field) for field in _FIELDS}
    return {field: array for field, array in fields.items() if array is not None}


def _to_disk(array: np.ndarray) -> np.ndarray:
    if array.dtype in _AS_BYTES:
        return array.view(np.uint8)
    assert array.dtype in DTYPES.values(), array.dtype
    return array


def _from_disk(
    parts: Mapping[str, np.ndarray], fmt: QuantFormat | None, dtype: Any
) -> np.ndarray | QuantizedArray:
    if "value" in parts:
        return parts["value"]
    assert fmt is not None
    code = parts["qvalue"]
    if code.dtype != fmt.storage_dtype:
        code = code.view(fmt.storage_dtype)
    return QuantizedArray(
        code,  # type: ignore[arg-type]  # host arrays stand where device arrays will
        parts["scale"],  # type: ignore[arg-type]
        parts.get("zero_point"),  # type: ignore[arg-type]
        None,
        None,
        parts.get("act_scale"),  # type: ignore[arg-type]
        fmt,
        np.dtype(dtype),
    )


def fingerprint(*arrays: np.ndarray) -> str:
    """sha256 of the contents of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def to_device(params: Any) -> Any:
    """Host arrays of a piece to the default device."""
    return jax.tree_util.tree_map(lambda x: jax.numpy.array(x, copy=True), params)
