"""Whole models: blocks in sequence, resuming, what is written, and the command line."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate import Settings, calibrate_checkpoint, sample_tokens
from qjax.calibrate.block import LayerResult, scale_channels
from qjax.calibrate.linears import GROUPS, Batch, run_block
from qjax.calibrate.report import plot_errors
from qjax.calibrate.store import BlockStore
from qjax.calibrate.text import read_documents
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.export import save_model
from qjax.checkpoints.hf import load_model
from qjax.formats import INT8_CHANNEL, QuantFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder, DecoderLayer
from qjax.quantize import is_quantized, path_string
from qjax.quantized_array import QuantizedArray
from scripts import quantize as script
from tests.tolerances import F32_SUM, relative_error

G8 = QuantFormat("int4", "group", group_size=8)
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=16,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=8,
    attention_bias=True,  # groups of equal shapes: half the compilations
    model_type="qwen2",
    dtype="float32",
)
FAST = Settings(G8, sweeps=1, sequential=False, kv_dtype="float8_e4m3fn")


@pytest.fixture(scope="module")
def params() -> dict:
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        # Norms around one, everything else of a size at which every layer matters.
        middle = 1.0 if path_string(path).endswith("weight") else 0.0
        return (middle + 0.2 * rng.normal(size=shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes["params"])


@pytest.fixture(scope="module")
def checkpoint(params: dict, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, CONFIG, params, "none", progress=False)
    return folder


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (6, 16)).astype(np.int32)
    return tokens, np.arange(16)[None, :] < np.asarray([16, 16, 9, 16, 1, 16])[:, None]


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    checkpoint: pathlib.Path,
    samples: tuple[np.ndarray, np.ndarray],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = {"batch_tokens": 64, "progress": False}
    report = calibrate_checkpoint(checkpoint, tmp_path / "whole", FAST, samples, **run)
    assert len(report.layers) == 14 and report.tokens == samples[1].sum()
    ratio = report.mean_ratio()
    assert ratio is not None and ratio < 0.8
    assert all(x.error < x.error_rtn for x in report.layers if x.error and x.error_rtn)

    saved: list[str] = []
    save = BlockStore.save

    def dying(self: BlockStore, name: str, *args: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(name)
        save(self, name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockStore, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(checkpoint, tmp_path / "again", FAST, samples, **run)
    assert saved == ["block-00000"] and not (tmp_path / "again").exists()
    monkeypatch.setattr(BlockStore, "save", save)
    other = dataclasses.replace(FAST, damping=0.02)
    with pytest.raises(ValueError, match="unfinished work with other settings"):
        calibrate_checkpoint(checkpoint, tmp_path / "again", other, samples, **run)
    calibrate_checkpoint(checkpoint, tmp_path / "again", FAST, samples, **run)
    assert _contents(tmp_path / "whole") == _contents(tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "again"}  # nothing left behind

    with pytest.raises(CheckpointError, match="not empty"):
        calibrate_checkpoint(checkpoint, tmp_path / "again", FAST, samples, **run)
    with pytest.raises(CheckpointError, match="quantized already"):
        calibrate_checkpoint(tmp_path / "again", tmp_path / "twice", FAST, samples, **run)

    loaded = load_model(tmp_path / "again", progress=False)
    kernel = loaded.params["model"]["layers_1"]["mlp"]["down_proj"]["kernel"]
    assert isinstance(kernel, QuantizedArray) and kernel.fmt == G8
    assert loaded.kv_scales is not None and len(loaded.kv_scales.keys) == 2
    table = json.loads((tmp_path / "again" / "calibration_report.json").read_text())
    assert table["layers"][0]["path"] == "model/layers_0/self_attn/q_proj/kernel"
    assert "| model/layers_0/self_attn/q_proj |" in report.to_markdown()
    few = dataclasses.replace(report.layers[0], note="only 3 tokens for 8 channels")
    alone = dataclasses.replace(report.layers[1], format=None, note="left alone by a rule")
    text = dataclasses.replace(report, layers=[few, alone], learned=[[(0.5, 0.25)]]).to_markdown()
    assert "Left alone: 1 layers. Too few tokens: 1 layers." in text
    assert "| 0 | 0.5 to 0.25 |" in text


def test_the_picture_is_the_same_every_time(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    layers = [LayerResult(f"a/{name}/kernel", "int4", 0.2, 0.1) for name in ("x", "y")]
    for name in ("1.png", "2.png"):
        assert plot_errors(layers, tmp_path / name)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert not plot_errors([LayerResult("a/x/kernel", None)], tmp_path / "3.png")


def test_target_bits_choose_formats_which_are_written(
    checkpoint: pathlib.Path, samples: tuple[np.ndarray, np.ndarray], tmp_path: pathlib.Path
) -> None:
    small = G8.replace(scale_dtype="bfloat16")  # 6 bits per weight, and int8 at least 9
    rules = (("lm_head/kernel", INT8_CHANNEL),)
    candidates = (small, INT8_CHANNEL)
    settings = Settings(G8, "rtn", rules, sequential=False, target_bits=7.5, candidates=candidates)
    output = tmp_path / "mixed"
    report = calibrate_checkpoint(checkpoint, output, settings, samples, progress=False)
    names = [x.format for x in report.layers]
    assert {small.name, INT8_CHANNEL.name} == set(names)
    loaded = load_model(output, progress=False).params["model"]["layers_1"]
    for entry in report.layers[7:14]:
        _, _, _, part, name, _ = f"x/{entry.path}".split("/")
        assert loaded[part][name]["kernel"].fmt.name == entry.format


def test_scaling_leaves_the_block_as_it_was(
    params: dict, samples: tuple[np.ndarray, np.ndarray]
) -> None:
    """AWQ's folding through norms, values with grouped queries and biases, and the gated MLP."""
    module = DecoderLayer(CONFIG, 0, jnp.float32)
    block = params["model"]["layers_0"]
    x = jnp.take(params["model"]["embed_tokens"]["embedding"], samples[0], axis=0)
    batch = Batch(x, jnp.asarray(samples[1]))
    formats = {f"{m}/kernel": G8 for group in GROUPS for m in group.members}
    settings = Settings(G8, method="awq")
    scaled, factors = scale_channels(module, block, [batch], formats, settings)
    for member, (rows, _) in factors.items():
        assert float(jnp.abs(rows - 1).max()) > 0.01, f"{member} was not scaled"
    before, after = (run_block(module, p, x, batch.valid)[0] for p in (block, scaled))
    assert relative_error(after, before) < 4 * F32_SUM  # four foldings


def test_a_rotated_model_is_written_and_loads(
    params: dict,
    checkpoint: pathlib.Path,
    samples: tuple[np.ndarray, np.ndarray],
    tmp_path: pathlib.Path,
) -> None:
    @jax.jit
    def apply(model: dict) -> jax.Array:
        variables = {"params": model}
        return Decoder(CONFIG, jnp.float32).apply(variables, jnp.asarray(samples[0]))[0]  # type: ignore

    def logits(model: dict) -> jax.Array:  # of plain arrays: compiled once
        plain = lambda x: x.dequantize(jnp.float32) if is_quantized(x) else x  # noqa: E731
        return apply(jax.tree_util.tree_map(plain, model, is_leaf=is_quantized))

    output = tmp_path / "rotated"
    settings = dataclasses.replace(FAST, rotate=True)
    report = calibrate_checkpoint(checkpoint, output, settings, samples, progress=False)
    assert report.method == "gptq after rotation"
    loaded = load_model(output, progress=False)
    assert loaded.config == CONFIG and loaded.kv_scales is not None
    assert relative_error(logits(loaded.params), logits(params)) < 0.3

    # Tied, and what stays unquantized keeps its type.
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    small = {"model": params["model"]}
    save_model(tmp_path / "tied", tied, small, "none", progress=False)
    arguments = ["--model", str(tmp_path / "tied"), "--output", str(tmp_path / "untied"), "--quiet"]
    options = ["--rotate", "--method", "rtn", "--format", "int8", "--rule", "lm_head/kernel=int8"]
    assert script.main(arguments + options) == 0
    loaded = load_model(tmp_path / "untied", progress=False)
    assert not loaded.config.tie_word_embeddings
    head = {"kernel": small["model"]["embed_tokens"]["embedding"].T}
    assert relative_error(logits(loaded.params), logits(small | {"lm_head": head})) < 0.05


def test_rtn_by_rules_without_data(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "rtn"
    arguments = ["--model", str(checkpoint), "--output", str(output), "--method", "rtn", "--quiet"]
    rules = ["--format", "int8", "--rule", "lm_head/kernel=int8", "--skip-layers", ".*/v_proj/.*"]
    assert script.main(arguments + rules) == 0
    loaded = load_model(output, progress=False).params
    assert loaded["lm_head"]["kernel"].fmt == INT8_CHANNEL
    assert not isinstance(
        loaded["model"]["layers_0"]["self_attn"]["v_proj"]["kernel"], QuantizedArray
    )
    direct = load_model(checkpoint, quantization=INT8_CHANNEL, progress=False).params
    mine, other = (p["model"]["layers_1"]["mlp"]["up_proj"]["kernel"] for p in (loaded, direct))
    np.testing.assert_array_equal(mine.qvalue, other.qvalue)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "needs calibration text: give --text FILE"),
        (["--method", "rtn", "--format", "fp8_e5m2"], "e4m3 only"),
        (["--method", "rtn", "--rule", "int8"], "must be REGEX=FORMAT"),
        (["--method", "smoothquant"], "for formats that quantize activations"),
        (["--method", "rtn", "--skip-layers", ".*/o_porj/.*"], "match none"),
    ],
)
def test_refusals_come_before_work(
    options: list[str],
    message: str,
    checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "out"), "--quiet"]
    assert script.main(arguments + options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", [".", "..", "link"])
def test_the_source_is_never_replaced(
    output: str, checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = checkpoint.parent / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint)
    before = _contents(checkpoint)
    target = link if output == "link" else checkpoint / output
    arguments = ["--model", str(checkpoint), "--output", str(target), "--overwrite", "--quiet"]
    assert script.main([*arguments, "--method", "rtn"]) == 2
    assert "itself; choose another folder" in capsys.readouterr().err
    assert _contents(checkpoint) == before
    link.unlink()


def test_only_models_are_overwritten(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("keep me")
    (tmp_path / "file").write_text("and me")
    arguments = ["--model", str(checkpoint), "--overwrite", "--quiet", "--method", "rtn"]
    for name, message in (("home", "holds no model"), ("file", "is not a folder")):
        assert script.main([*arguments, "--output", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "home" / "letters.txt").read_text() == "keep me"
    assert (tmp_path / "file").read_text() == "and me"
    target = tmp_path / "model"
    for _ in range(2):
        assert script.main([*arguments, "--output", str(target)]) == 0
    assert (target / "config.json").exists() and set(tmp_path.iterdir()) == {
        tmp_path / name for name in ("home", "file", "model")
    }


def test_text_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        read_documents(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(ValueError, match="a.json is not JSON"):
        read_documents(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": 5}\n')
    with pytest.raises(ValueError, match="a.jsonl:3 must be an object"):
        read_documents(tmp_path / "a.jsonl")


def test_documents_may_hold_any_character(tmp_path: pathlib.Path) -> None:
    # A line separator and a next line are not the end of a JSON line; the byte order
    # mark and carriage returns of Windows are no text.
    line = '{"text": "a\u2028b\x85c"}\r\n{"text": "d"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert read_documents(tmp_path / "a.jsonl") == ["a\u2028b\x85c", "d"]


def test_samples_are_spread_over_the_documents_and_cut() -> None:
    documents = ["a" * 5, "b" * 20, "c" * 3]
    encode = lambda text: [1, *map(ord, text)]  # noqa: E731
    tokens, valid = sample_tokens(documents, encode, num_samples=8, seq_len=8, bos_id=1)
    assert tokens.shape == (5, 8) and valid.sum(1).tolist() == [6, 8, 8, 7, 4]
    assert (tokens[:, 0] == 1).all() and (tokens[~valid] == 0).all()
    assert (tokens == ord("b")).sum() == 20
    few, _ = sample_tokens(documents * 50, encode, num_samples=4, seq_len=8, bos_id=1)
    assert few.shape == (4, 8)
