"""Two runs in one folder: the second fails at once or waits, and a killed one leaves no lock."""

from __future__ import annotations

import errno
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qjax import _files
from qjax.calibrate import cached, run
from scripts import quantize
from tests.calibration.tiny import write_model
from tests.test_train_cli import SMALL
from tests.test_training import TEXT

# The file alone: without jax a process starts in no time. It ends when its standard input does.
HOLDER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.sole_run(sys.argv[2], "it"):
    print("in", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """Inside, another process has the lock; killed at the end if it is still there."""
    command = [sys.executable, "-c", HOLDER, str(_files.__file__), str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "in\n"
            yield process
        finally:
            process.kill()


def _in_use(folder: pathlib.Path, pid: int) -> str:
    return f"{folder} is in use by another run (process {pid} on {socket.gethostname()}); "


def _flags(tmp_path: pathlib.Path) -> list[str]:
    write_model(tmp_path / "model", layers=1)
    flags = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--quiet"]
    return [*flags, "--method", "rtn", "--format", "int8"]


def test_quantize_refuses_a_folder_in_use_until_the_other_is_killed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, lock = _flags(tmp_path), tmp_path / ".out.calibration.lock"
    with held(lock) as other:
        assert quantize.main(flags) == 2
        error = capsys.readouterr().err
        expected = _in_use(tmp_path / "out", other.pid)
        assert error == f"error: {expected}wait for it or stop it, or choose another folder\n"
        assert {path.name for path in tmp_path.iterdir()} == {"model", lock.name}
    assert other.returncode == -9 and lock.exists()  # the file stays, and locks nobody out
    assert quantize.main(flags) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_a_run_holds_its_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, calibrate, second = _flags(tmp_path), run._calibrate, []

    def meanwhile(*args):
        second.append(quantize.main(flags))
        assert _in_use(tmp_path / "out", os.getpid()) in capsys.readouterr().err
        return calibrate(*args)

    monkeypatch.setattr(run, "_calibrate", meanwhile)
    assert quantize.main(flags) == 0 and second == [2]


def test_train_refuses_a_folder_in_use(tmp_path: pathlib.Path) -> None:
    from scripts import train

    out = tmp_path / "out"
    (tmp_path / "text.txt").write_text(TEXT)
    argv = f"--text {tmp_path / 'text.txt'} --output-dir {out} --max-steps 1 {SMALL}".split()
    with held(out / ".run.lock") as other:
        with pytest.raises(ValueError) as caught:
            train.main(argv)
        assert _in_use(out, other.pid) in str(caught.value)
        assert [path.name for path in out.iterdir()] == [".run.lock"]
    train.main(argv)
    assert (out / "model.safetensors").exists() and not (out / ".run.lock").exists()
    # A mistake leaves no folder behind, though the lock comes first.
    with pytest.raises(ValueError, match="does not exist"):
        train.main([*argv, "--text", "none.txt", "--output-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_second_server_waits_for_the_calibration_of_the_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", layers=1)
    (tmp_path / "text.txt").write_text("the quick brown fox. " * 20)
    made: list[pathlib.Path] = []

    def calibrate(_, output: pathlib.Path, *args, **kwargs) -> None:
        output.mkdir()
        made.append(output)

    monkeypatch.setattr(cached, "calibrate_checkpoint", calibrate)

    def find(cache: pathlib.Path, say) -> pathlib.Path:
        return cached.calibrated_folder(
            tmp_path / "model", "gptq", text=tmp_path / "text.txt", cache=cache, say=say
        )

    name = find(tmp_path / "first", lambda line: None).name
    target, lines = tmp_path / "cache" / name, []
    with held(target.with_name(f".{name}.lock")) as other:

        def say(line: str) -> None:
            lines.append(line)
            if "waiting" in line:  # the other finishes
                target.mkdir()
                assert other.stdin is not None
                other.stdin.close()

        assert find(tmp_path / "cache", say) == target
    assert lines == [
        f"{_in_use(target, other.pid)}waiting for it",
        f"using {target}, calibrated before",
    ]
    assert len(made) == 1 and [path.name for path in target.parent.iterdir()] == [name]


def test_a_file_that_was_removed_locks_nobody_out(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gets the lock of a file that its last holder removed tries the new file."""
    lock, tried, removed = tmp_path / "lock", _files.try_lock, []

    def late(file, *, wait: bool = False) -> bool:
        if not removed:
            removed.append(lock.unlink())
        return tried(file, wait=wait)

    monkeypatch.setattr(_files, "try_lock", late)
    with _files.sole_run(lock, tmp_path):
        assert removed and lock.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match="in use"), _files.sole_run(lock, tmp_path):
            pass
        assert lock.exists()
    assert not lock.exists()


@pytest.mark.parametrize("system", ["without flock", "network"])
def test_without_locks_there_is_a_warning(
    system: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if system == "network":
        monkeypatch.setattr(_files.fcntl, "flock", refuse)
    else:
        monkeypatch.setattr(_files, "fcntl", None)
    with pytest.warns(UserWarning, match="see to it that no other run uses it") as caught:
        with _files.sole_run(tmp_path / "lock", "it"):
            pass
    assert caught[0].filename == __file__
