"""Results that survive an interruption: a partial file grows line by line and is resumed.

``out.jsonl.partial`` begins with a header holding everything the results depend on; each further
line is one finished result with its index. When all are there, ``out.jsonl`` is written in input
order, atomically, and the partial file is removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from qjax._files import NO_LOCKS, try_lock, write_text_atomic

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the output.

    Attributes:
      prompt: The text the model saw.
      text: The generated text, without special tokens.
      token_ids: The generated tokens; the last is the end-of-sequence token if ``stop``.
      prompt_tokens: Tokens of the prompt.
      finish_reason: ``stop`` or ``length``.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str


def fingerprint(value: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def checkpoint_fingerprint(folder: Path) -> str:
    """Short hash of a checkpoint's configuration and of the names and sizes of its weight files."""
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    return fingerprint([files, (folder / "config.json").read_text(encoding="utf-8")])


def json_line(values: Mapping[str, Any]) -> str:
    """One line of JSON, readable, and without the characters at which some readers split lines."""
    line = json.dumps(dict(values), ensure_ascii=False)
    for character in "\x85\u2028\u2029":
        line = line.replace(character, f"\\u{ord(character):04x}")
    return line + "\n"


def _lock(file: BinaryIO, path: Path) -> None:
    """Until the file is closed nobody else gets as far as this."""
    try:
        free = try_lock(file)
    except OSError as error:
        # Some network file systems have no locks; there two runs are the user's to keep apart.
        if error.errno not in NO_LOCKS:
            raise
        return
    if not free:
        raise ValueError(
            f"{path} is being written by another process; wait for it, or name another output"
        )


class ResultFile:
    """Collects results of a known number of prompts; a context manager.

    Attributes:
      path: The final file.
      partial: The file that grows.
      done: Results so far by index; those of an interrupted run are there from the start.
    """

    def __init__(
        self, path: str | Path, count: int, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        """Open the partial file, resuming an interrupted run with the same settings.

        Args:
          path: Output file.
          count: Number of results there will be.
          settings: Everything the results depend on; JSON values.
          overwrite: Replace an existing output file at the end.

        Raises:
          ValueError: If the output exists, or the partial file belongs to other settings, is
            damaged (says what to delete) or is being written by another process.
          OSError: If the folder cannot be written.
        """
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.done: dict[int, Result] = {}
        self._count = count
        # Through JSON and back, so that it compares equal to what is read.
        header = {"qjax_partial": _VERSION, "settings": json.loads(json.dumps(dict(settings)))}
        if self.path.exists() and not overwrite:
            raise ValueError(f"{self.path} exists; name another file, or give --overwrite")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = os.fdopen(
            os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b"
        )
        try:
            _lock(self._file, self.partial)
            end = self._resume(header)
            self._file.truncate(end)
            self._file.seek(end)
            if not end:
                self._append(header)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, header: Mapping[str, Any]) -> int:
        """Read the partial file; returns the length of its sound part."""
        end = 0
        for number, line in enumerate(self.partial.read_bytes().splitlines(keepends=True), 1):
            # A line without its end was being written when the run was killed.
            if not line.endswith(b"\n"):
                break
            try:
                values = json.loads(line)
                if number == 1:
                    self._compare(values, header)
                else:
                    index = values.pop("index")
                    self.done[index] = Result(**{**values, "token_ids": tuple(values["token_ids"])})
            except (json.JSONDecodeError, TypeError, KeyError, AttributeError):
                raise ValueError(
                    f"{self.partial}:{number} is damaged; delete the file to start over"
                ) from None
            end += len(line)
        return end

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if found["qjax_partial"] != wanted["qjax_partial"]:
            raise ValueError(f"{self.partial} was written by another version; delete it")
        old, new = found["settings"], wanted["settings"]
        changed = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
        if changed:
            what = ", ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in changed[:3])
            raise ValueError(
                f"{self.partial} holds results of a run with other settings ({what}); delete it to "
                "start over, or repeat that run's settings to finish it"
            )

    def add(self, index: int, result: Result) -> None:
        """Record one result; it is in the file when this returns."""
        self.done[index] = result
        self._append({"index": index, **dataclasses.asdict(result)})

    def _append(self, values: Mapping[str, Any]) -> None:
        self._file.write(json_line(values).encode())
        self._file.flush()

    def finish(self) -> None:
        """Write the output in input order and remove the partial file.

        Raises:
          ValueError: If results are missing.
        """
        missing = [i for i in range(self._count) if i not in self.done]
        if missing:
            raise ValueError(f"{len(missing)} of {self._count} results are missing: {missing[:5]}")
        lines = (json_line(dataclasses.asdict(self.done[i])) for i in range(self._count))
        write_text_atomic(self.path, "".join(lines))
        self._file.close()
        os.unlink(self.partial)

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.done:
            # Nothing is lost with it, and it would bind the next run to this one's settings. While
            # it is locked: afterwards it may be another's.
            self.partial.unlink(missing_ok=True)
        self._file.close()
