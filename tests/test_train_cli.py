"""scripts/train.py: runs, resumes, interruptions, and mistakes found before any work."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qjax.checkpoints.hf import load_model
from qjax.formats import INT4_G32
from qjax.training import bpe, folder, interrupt, loop
from tests.test_training import CONFIG, TEXT, fresh
from tests.test_training import tokenizer as tokenizer

SMALL = (
    "--vocab-size 300 --hidden-size 16 --intermediate-size 16 --num-layers 1 --num-heads 2 "
    "--num-kv-heads 1 --head-dim 8 --seq-len 16 --batch-size 2 --dtype float32 --optimizer adamw"
)


def test_script_trains_resumes_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import train as script

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "out"
    argv = f"--text {text} --valid {text} --output-dir {out} --max-steps 2 {SMALL}"
    script.main(argv.split())
    first = capsys.readouterr().out
    assert "2 updates" in first and "perplexity" in first
    assert len(json.loads((out / "history.json").read_text())) == 2
    assert load_model(out, progress=False).tokenizer is not None
    weights = (out / "model.safetensors").read_bytes()
    script.main(argv.split())  # nothing left to do
    assert capsys.readouterr().out == first
    assert (out / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="does not exist"):
        script.main([*argv.split(), "--text", str(tmp_path / "none.txt")])


@pytest.mark.parametrize("flag", ["--text", "--valid"])
def test_script_refuses_short_texts_before_training(flag: str, tmp_path: Path) -> None:
    from scripts import train as script

    text, short = tmp_path / "text.txt", tmp_path / "short.txt"
    text.write_text(TEXT)
    short.write_text("the cat")
    argv = f"--text {text} --output-dir {tmp_path / 'out'} --max-steps 2 {SMALL} {flag} {short}"
    with pytest.raises(ValueError, match=rf"{flag} .*short.txt has \d+ tokens, fewer than"):
        script.main(argv.split())
    assert not (tmp_path / "out" / "history.json").exists()


@pytest.mark.parametrize(
    "flags", ["--qat-scales range", "--qat-kv int8", "--export awq", "--export compressed-tensors"]
)
def test_script_ignores_no_flag_of_qat(flags: str, tmp_path: Path) -> None:
    from scripts import train as script

    argv = f"--text none --output-dir {tmp_path / 'out'} --max-steps 2 {SMALL} {flags}"
    with pytest.raises(ValueError, match=f"{flags.split()[0]} goes with --qat"):
        script.main(argv.split())


def test_script_saves_at_a_signal_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import train as script

    text, out, whole = (tmp_path / name for name in ("text.txt", "out", "whole"))
    text.write_text(TEXT)
    argv = f"--text {text} --max-steps 4 {SMALL}".split()
    handler = signal.getsignal(signal.SIGINT)

    def with_ctrl_c(*args: Any, **kwargs: Any) -> Any:
        for state, metrics in loop.train(*args, **kwargs):
            if metrics.step == 2:
                signal.raise_signal(signal.SIGINT)
            yield state, metrics

    monkeypatch.setattr(script, "train", with_ctrl_c)
    with pytest.raises(KeyboardInterrupt, match="after step 2; the same command goes on"):
        script.main([*argv, "--output-dir", str(out)])
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(script, "train", loop.train)
    script.main([*argv, "--output-dir", str(out)])
    script.main([*argv, "--output-dir", str(whole)])
    for name in ("model.safetensors", "history.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_refused_vocabulary_binds_no_folder(tmp_path: Path) -> None:
    from scripts import train as script

    (tmp_path / "text.txt").write_text(TEXT)
    argv = f"--text {tmp_path / 'text.txt'} --output-dir {tmp_path / 'out'} --max-steps 1 {SMALL}"
    with pytest.raises(ValueError, match="vocab_size=10 must be at least 259"):
        script.main([*argv.split(), "--vocab-size", "10"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is no file; give the path"):
        script.main([*argv.split(), "--text", str(tmp_path)])


def test_the_second_signal_acts_at_once() -> None:
    # A shell starts what it runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupt.wish_to_stop() as stopping:
            assert not stopping()
            signal.raise_signal(signal.SIGINT)
            assert stopping()
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_kill_between_checkpoint_and_history_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import train as script

    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    argv = f"--text {text} --output-dir {out} --max-steps 3 --checkpoint-seconds 0 {SMALL}".split()

    class Killed(Exception):
        pass

    save = loop.TrainingCheckpoints.save

    def save_and_die(self: Any, state: Any) -> None:
        save(self, state)
        raise Killed

    monkeypatch.setattr(loop.TrainingCheckpoints, "save", save_and_die)
    with pytest.raises(Killed):
        script.main(argv)
    monkeypatch.setattr(loop.TrainingCheckpoints, "save", save)
    script.main(argv)
    assert len(json.loads((out / "history.json").read_text())) == 3


def test_script_trains_an_existing_model_for_a_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    from scripts import train as script

    text, start, out = tmp_path / "text.txt", tmp_path / "start", tmp_path / "out"
    text.write_text(TEXT)
    config = dataclasses.replace(CONFIG, max_position_embeddings=16, bos_token_id=0)
    bpe.save_tokenizer(tokenizer, start, model_max_length=16)
    folder.export_hf(fresh().params, config, start)
    argv = f"--text {text} --output-dir {out} --max-steps 1 --seq-len 16 --init-from {start}"
    argv += " --qat int4_g32 --batch-size 2 --optimizer adamw --dtype float32"
    script.main(argv.split())
    assert "1 updates" in capsys.readouterr().out
    loaded = load_model(out / "quantized", progress=False)
    assert loaded.config == dataclasses.replace(config, dtype="bfloat16")
    kernel = loaded.params["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.fmt == INT4_G32
    # Its own result can be trained further, here after what the original says.
    again = argv.replace(str(out), str(tmp_path / "again")).replace(str(start), f"{out}/quantized")
    script.main([*again.split(), "--teacher", str(start)])
    assert load_model(tmp_path / "again" / "quantized", progress=False).method is not None
    for more, message in [
        ("--hidden-size 8", "leave out"),
        ("--seq-len 17", "exceeds the 16 positions"),
        ("--qat int5", "unknown format"),
        ("--qat none", "--qat none does not quantize"),
        ("--qat fp8 --export gptq --output-dir X", "gptq cannot store"),
        ("--checkpoint-seconds nan", "nan must be 0 or more"),
        ("--qat int8", "started with other settings"),
    ]:
        with pytest.raises(ValueError, match=message):
            script.main([*argv.split(), *more.replace("X", str(tmp_path / "x")).split()])
    assert not (tmp_path / "x" / "history.json").exists()  # found before the first update
    longer = dataclasses.replace(config, max_position_embeddings=8)
    folder.export_hf(fresh().params, longer, tmp_path / "short")
    with pytest.raises(ValueError, match="exceeds the 8 positions of --teacher"):
        script.main([*argv.split(), "--teacher", str(tmp_path / "short")])
