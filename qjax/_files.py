"""Files that several processes see: written atomically, and locked while one of them works.

A reader sees the old file or the whole new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
"""The system's locks; Windows has none."""

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""What ``try_lock`` fails with on a system, or a file system, that has no locks."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which replaces it if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same directory: os.replace is atomic only within one file system. The suffix stays, since
    # writers look at it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def try_lock(file: IO, *, wait: bool = False) -> bool:
    """Locks an open file against other processes, and against whoever else opens it in this one.

    The system takes the lock back when the file is closed or the process dies, however it dies.

    Args:
      file: Open for writing: NFS wants that.
      wait: Until whoever has the lock is done.

    Returns:
      Whether this process has the lock now.

    Raises:
      OSError: With an ``errno`` of ``NO_LOCKS`` if there are no locks here.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no flock")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def sole_run(
    path: str | Path, folder: str | Path, waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Inside, no other process that names the same ``path`` is inside.

    The lock is the system's, so a run that was killed leaves none; the file that it leaves behind
    locks nobody out. Where there are no locks (Windows, some network file systems) it warns, and
    two runs are the user's to keep apart.

    Args:
      path: File to lock, best outside what the run replaces or removes. It holds who has the lock,
        and is removed at the end, as is its folder if that was made for it and is empty.
      folder: What is being worked at, for messages.
      waiting: Is told in a line who has the lock, which is then waited for; None does not wait.

    Raises:
      ValueError: If another run has the lock and ``waiting`` is None; nothing is written then.
      OSError: If the file cannot be written.
    """
    path = Path(path)
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = _locked(path, folder, waiting, stack)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is locked: afterwards it may be another's
            if made:
                with contextlib.suppress(OSError):  # not empty
                    path.parent.rmdir()


def _locked(
    path: Path,
    folder: str | Path,
    waiting: Callable[[str], None] | None,
    stack: contextlib.ExitStack,
) -> IO[str]:
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
        stack.enter_context(file)
        try:
            if not try_lock(file):
                # Nothing for a moment, between locking and writing.
                holder = f"another run ({file.read() or 'which has just begun'})"
                if waiting is None:
                    raise ValueError(
                        f"{folder} is in use by {holder}; wait for it or stop it, or choose "
                        "another folder"
                    )
                waiting(f"{folder} is in use by {holder}; waiting for it")
                try_lock(file, wait=True)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}): see to it that no other run uses "
                f"{folder} at the same time",
                stacklevel=4,
            )
            return file
        # Who had it before has removed it: another may hold a new file of this name by now.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.seek(0)
                return file
        file.close()
