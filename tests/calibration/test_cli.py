"""scripts/quantize.py: mistakes are found before any work, and Ctrl-C ends in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import quantize as script


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method rtn --damping 0.1", "--damping 0.1 has no use with --method rtn"),
        ("--method awq --sweeps 2", "--sweeps 2 has no use with --method awq"),
        ("--method gptq --steps 5", "--steps 5 has no use with --method gptq"),
        (
            "--method smoothquant --format w8a8_int8 --correction 0",
            "--correction 0.0 has no use with --method smoothquant",
        ),
        ("--candidates int4", "--candidates int4 has no use without --target-bits"),
        ("--num-samples 4", "--num-samples 4 has no use without --text"),
        ("--seq-len 4", "--seq-len 4 has no use without --text"),
        ("--batch-tokens 0", "--batch-tokens 0 must be at least 1"),
        ("--damping nan", "damping=nan must be positive and finite"),
        ("--correction inf", "correction=inf must be positive and finite"),
        ("--target-bits nan", "target_bits=nan must be positive and finite"),
        ("--rule lm_head", "must be REGEX=FORMAT"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # There is no such model: settings are looked at first.
    output = tmp_path / "out"
    assert (
        script.main(["--model", str(tmp_path / "m"), "--output", str(output), *flags.split()]) == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not output.exists()


def test_flags_of_a_method_reach_it() -> None:
    parse = script.build_parser().parse_args
    base = ["--model", "m", "--output", "o", "--text", "t"]
    settings = script.parse_settings(parse([*base, "--method", "gptq+scales"]))
    assert settings == script.Settings(script.parse_format("int4"), "gptq+scales")
    flags = ["--damping", "0.02", "--sweeps", "1", "--steps", "3", "--correction", "0"]
    settings = script.parse_settings(parse([*base, "--method", "gptq+scales", *flags]))
    found = settings.damping, settings.sweeps, settings.steps, settings.correction
    assert found == (0.02, 1, 3, None)


def test_nothing_can_crash_after_ctrl_c() -> None:
    """The status and the output arrive, and the interpreter is not asked to tidy up."""
    code = "import atexit; from qjax._device import end_process; atexit.register(print, 'late')"
    for status, said in ((130, "out"), (2, "out\nlate")):
        command = [sys.executable, "-c", f"{code}; print('out'); end_process({status})"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout.strip()) == (status, said), result.stderr


def test_ctrl_c_is_one_line_and_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "calibrate_checkpoint", interrupted)
    flags = ["--model", str(tmp_path), "--output", str(tmp_path / "out"), "--method", "rtn"]
    assert script.main(flags) == 130
    error = capsys.readouterr().err
    assert error == "quantize.py: interrupted; the same command goes on from there\n"
