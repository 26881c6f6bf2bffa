"""Sizes and CRC-32 sums of the files of a native checkpoint.

TensorStore finds damage of its indices but not of the numbers themselves: a flipped bit there is a
wrong weight. Damage that it does find is reported for the first of many reads, while the others
fail in the background. So everything is compared before it opens a file.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qjax.checkpoints.errors import CheckpointError

_BLOCK = 2**22


def file_sums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file under a folder, by relative path."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    names = [name for name in names if (folder / name).is_file()]
    sums = _map(lambda name: _crc(folder / name), names)
    sizes = [(folder / name).stat().st_size for name in names]
    return {name: [size, crc] for name, size, crc in zip(names, sizes, sums, strict=True)}


def check_files(folder: Path, wanted: Any) -> None:
    """Compare a folder with the ``file_sums`` it was written with.

    Raises:
      CheckpointError: If a file is missing, cut short or changed.
    """
    if not isinstance(wanted, Mapping) or not all(
        isinstance(entry, list) and [type(v) for v in entry] == [int, int]
        for entry in wanted.values()
    ):
        raise CheckpointError(f"the manifest beside {folder} lists no files; copy it again")
    for name, (size, _) in wanted.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"{path} {what}, it was written with {size}; copy the checkpoint again"
            )
    sums = _map(lambda name: _crc(folder / name), list(wanted))
    for (name, (_, crc)), found in zip(wanted.items(), sums, strict=True):
        if found != crc:
            raise CheckpointError(
                f"{folder / name} is not as it was written (CRC-32 {found:08x}, not {crc:08x}); "
                "copy the checkpoint again"
            )


def json_sum(value: Any) -> int:
    """CRC-32 of a JSON value, however it is laid out."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _map(work: Any, names: list[str]) -> list[int]:
    # zlib lets other threads run: one core does about 1 GB/s.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, names))
