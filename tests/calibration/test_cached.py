"""serve.py --quantization gptq: calibrates, keeps the result, finds it again."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from qjax.calibrate import Settings, cached, calibrate_checkpoint
from qjax.checkpoints.hf import load_model
from qjax.formats import INT4_G32, INT8_CHANNEL
from scripts import serve
from tests.calibration.tiny import write_model

SHORT = ["--max-new-tokens", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, layers=1, tied=False)
    return folder


def test_serve_calibrates_once(
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def quick(
        source: pathlib.Path, output: pathlib.Path, settings: Settings, _: Any, **__: Any
    ) -> None:
        assert settings.method == "awq"
        settings = Settings(settings.fmt, "rtn", rules=settings.rules)
        calibrate_checkpoint(source, output, settings, None, progress=False)

    monkeypatch.setattr(cached, "calibrate_checkpoint", quick)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    cache = tmp_path / "cache"
    flags = ["--model", str(model), "--prompt", "a", *SHORT]
    flags += ["--quantization", "awq:int4_g32", "--calibration-cache", str(cache)]
    flags += ["--calibration-data", str(text), "--lm-head-format", "int8"]
    assert serve.main(flags) == 0
    first = capsys.readouterr()
    assert first.out and f"calibrating tiny with awq for int4_g32, on {text}" in first.err
    (made,) = cache.iterdir()
    assert made.name.startswith("tiny-awq-int4_g32-")
    params = load_model(made, progress=False).params
    assert params["model"]["layers_0"]["mlp"]["up_proj"]["kernel"].fmt == INT4_G32
    assert params["lm_head"]["kernel"].fmt == INT8_CHANNEL

    lines: list[str] = []
    found = cached.calibrated_folder(
        model,
        "awq:int4_g32",
        text=text,
        head=INT8_CHANNEL,
        cache=cache,
        say=lines.append,
        progress=False,
    )
    assert found == made and lines == [f"using {made}, calibrated before"]


def test_the_key_follows_model_method_and_text(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[pathlib.Path, Any]] = []

    def calibrate(source: Any, output: pathlib.Path, settings: Any, samples: Any, **_: Any) -> None:
        output.mkdir()
        made.append((output, samples))

    monkeypatch.setattr(cached, "calibrate_checkpoint", calibrate)
    text = tmp_path / "text.txt"
    for content in ("some words", "other words"):
        text.write_text(content)
        for name in ("gptq", "awq", "gptq:int8", "gptq"):
            cached.calibrated_folder(model, name, text=text, cache=tmp_path / "c")
    cached.calibrated_folder(model, "gptq", text=text, kv_dtype="int8", cache=tmp_path / "c")
    cached.calibrated_folder(model, "gptq", text=text, head=INT8_CHANNEL, cache=tmp_path / "c")
    assert len({path for path, _ in made}) == len(made) == 8
    cached.calibrated_folder(model, "gptq", cache=tmp_path / "c")
    tokens, valid = made[-1][1]  # written by the model itself
    assert tokens.shape == (64, 64) and valid.all() and len(np.unique(tokens[:, 5])) > 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantization", "smoothquant:int4"], "smoothquant is for formats that quantize act"),
        (["--quantization", "gptq:int5"], "unknown"),
        (["--quantization", "gptq", "--calibration-data", "nowhere.txt"], "nowhere.txt"),
        (["--quantization", "int4", "--calibration-data", "x"], "has no use with --quantization"),
        (["--quantization", "gtpq"], "unknown"),
        (["--quantization", "autoround", "--lm-head-format", "fp8"], "integers; float8_e4m3fn_"),
    ],
)
def test_refusals(
    flags: list[str],
    message: str,
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = ["--calibration-cache", str(tmp_path / "cache")]
    assert serve.main(["--model", str(model), "--prompt", "a", *SHORT, *flags, *cache]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "cache").exists()
