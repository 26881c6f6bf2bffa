"""Memory-mapped safetensors: headers are parsed and checked here, tensors are views of the file.

A file is 8 bytes of little-endian header length, a JSON header, then the data. Nothing is read
beyond the header until a tensor is asked for, and what is asked for is a read-only view: pages come
in when touched and the kernel may drop them again, so a checkpoint larger than memory can be walked
through.

References:
  https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qjax.checkpoints.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

# The limit of the reference implementation: a larger number is a damaged file, not a header.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header: dtype as safetensors names it, shape, file, and byte range in the
    file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path = Path()
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check the header of one safetensors file.

    Raises:
      CheckpointError: If the file is truncated or damaged, with what was found and what to do.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length_bytes = f.read(8)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: {size} bytes, header length "
                    f"{length}; "
                    "download it again (a file of about 130 bytes is a git-lfs pointer: run `git "
                    "lfs pull`)"
                )
            text = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError(f"header is a {type(header).__name__}, not an object")
        header.pop("__metadata__", None)
        infos = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({e}); download it again"
        ) from e
    needed = max((info.end for info in infos.values()), default=8 + length)
    if needed > size:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes, its header needs {needed}; download it again"
        )
    return infos


def _entry(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
    begin, end = (data_start + int(n) for n in entry["data_offsets"])
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {dtype}, which is not known; known are "
            f"{', '.join(DTYPES)}"
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if begin < data_start or end - begin != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name} ({dtype} {shape}) needs {nbytes} bytes, its header gives it "
            f"{end - begin}; "
            "the file is damaged, download it again"
        )
    return TensorInfo(dtype, shape, path, begin, end)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      CheckpointError: If the file cannot be read, is not JSON, or holds something else than an
        object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise CheckpointError(f"{path} is not valid JSON ({e}); download it again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


class SafetensorsCheckpoint(Mapping[str, np.ndarray]):
    """All tensors of a folder with ``model.safetensors`` or an index and shards, by name.

    Construction reads and checks every header. ``checkpoint[name]`` is a read-only view into the
    mapped file, whose pages ``release`` drops again. Threads may read different tensors at once.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tensors = read_headers(self.folder)
        self._maps: dict[Path, mmap.mmap] = {}
        self._touched: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        self._touched.add(name)
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return np.zeros(info.shape, dtype)
        count = math.prod(info.shape)
        flat = np.frombuffer(self._map(info.file), np.uint8, info.nbytes, info.begin)
        # A view as uint8 first: numpy refuses offsets that are not aligned to the item size when
        # it is given them as a dtype, and the format promises no alignment.
        if info.begin % dtype.itemsize:
            flat = flat.copy()
        return flat.view(dtype)[:count].reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Drop the pages of some tensors, or of all handed out so far, from this process.

        Their views stay valid: pages are read from the file again when touched.
        """
        for name in tuple(self._touched if names is None else names):
            self._release(self.tensors[name])
            self._touched.discard(name)

    def _release(self, info: TensorInfo) -> None:
        mapped = self._maps.get(info.file)
        if mapped is None:
            return
        # Whole pages inside the tensor only: the rest belongs to its neighbours.
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = info.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as f:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            return self._maps.setdefault(file, mapped)  # another thread may have been faster
        return self._maps[file]


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Headers of all shards of a folder; the index, if there is one, must agree with them.

    Raises:
      CheckpointError: If there is no safetensors file, a shard is missing or damaged, or index and
        shards differ.
    """
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        single = folder / SINGLE_FILE
        if single.exists():
            return read_header(single)
        others = sorted(p.name for p in folder.glob("*.safetensors"))
        if len(others) == 1:
            return read_header(folder / others[0])
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(
            p.name for p in folder.glob("*.pt*")
        )
        if others:
            names = ", ".join(others[:3])
            why = f"it holds {len(others)} .safetensors files ({names}, ...) without an index"
        elif pickled:
            why = (
                f"it holds pickled weights ({', '.join(pickled[:3])}), which are not read because "
                "loading them "
                "can run code; convert them to safetensors"
            )
        else:
            why = "it holds no .safetensors file; download the weights as well"
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: {why}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map from tensor names to files")
    infos: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index_path} names {file!r}, which is not a file of the folder")
        if not (folder / file).exists():
            n = sum(f == file for f in weight_map.values())
            raise CheckpointError(
                f"{index_path} needs shard {file} ({n} tensors), which is not there; download it"
            )
        for name, info in read_header(folder / file).items():
            if name in infos:
                raise CheckpointError(
                    f"tensor {name} stands in {infos[name].file.name} and in {file}; remove the "
                    "stray shard"
                )
            infos[name] = info
    for name, file in weight_map.items():
        if name not in infos or infos[name].file.name != file:
            where = f"it is in {infos[name].file.name}" if name in infos else "it is in no shard"
            raise CheckpointError(
                f"{index_path} says that tensor {name} is in {file}, but {where}; download the "
                "index and shards again"
            )
    return infos
