"""scripts/compare.py from the command line to its files."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.kv_scale_files import write_kv_scale_file
from qjax.checkpoints.reader import KVScales
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.training import bpe, folder, loop
from scripts import compare
from tests.serving_model import write_model

TEXT = "the cat sat on the mat and the dog sat on the log.\n\nwhy did the cat sit?\n" * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer, untrained but with predictions that differ."""
    path = tmp_path_factory.mktemp("model")
    bpe.load_or_train_tokenizer(path, TEXT, 300, model_max_length=64)
    config = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_layers=1,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
    )
    params = loop.init_params(Decoder(config), 0)
    folder.export_hf(jax.tree.map(lambda p: p * 8 if p.ndim == 2 else p, params), config, path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def test_every_combination_becomes_a_row(model: Path, text: Path, tmp_path: Path, capsys) -> None:
    argv = f"--model {model} --text {text} --output-dir {tmp_path} --formats bf16,int4_g32"
    argv += " --kv-cache-dtypes float32,int8:dynamic --seq-len 32 --max-tokens 50 --batch-size 2"
    compare.main([*argv.split(), "--dtype", "float32"])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(r["format"], r["kv_cache_dtype"]) for r in rows] == [
        ("bf16", "float32"),
        ("bf16", "int8:dynamic"),
        ("int4_g32", "float32"),
        ("int4_g32", "int8:dynamic"),
    ]
    same, kv, weights, both = rows
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1
    assert 0 < kv["kl"] < weights["kl"]
    assert same["perplexity_change"] is None and kv["perplexity_change"] != 0
    assert weights["weight_bytes"] < same["weight_bytes"] == kv["weight_bytes"]
    assert kv["kv_bytes_per_token"] == 2 * (16 + 4) and same["kv_bytes_per_token"] == 2 * 16 * 4
    for row in rows:
        assert row["tokens"] == 50 and row["perplexity"] > 1
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0
        assert row["backend"] == "cpu" and row["device"]
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") == 5 and "int8:dynamic" in table
    out = capsys.readouterr().out
    assert "results.json" in out and "| bf16 | float32 |" in out


def test_static_kv_scales_come_from_a_file(model: Path, text: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_hf(model)
    argv = f"--model {model} --text {text} --formats bf16 --seq-len 32 --max-tokens 50 --no-speed"
    argv += f" --kv-cache-dtypes int8:static --quantization-param-path {tmp_path / 's.json'}"
    kl = []
    for name, scale in (("good", 0.02), ("bad", 30.0)):
        per_layer = (np.full(config.num_kv_heads, scale, np.float32),) * config.num_layers
        scales = KVScales(per_layer, per_layer, "int8")
        write_kv_scale_file(tmp_path / "s.json", scales, config)
        compare.main([*argv.split(), "--output-dir", str(tmp_path / name)])
        (row,) = json.loads((tmp_path / name / "results.json").read_text())
        assert row["kv_cache_dtype"] == "int8:static"
        kl.append(row["kl"])
    assert kl[0] < kl[1] / 10


def test_pieces_between_separators_are_scored_one_by_one(model: Path, text: Path) -> None:
    argv = ["--text", str(text), "--output-dir", "unused", "--separator", "why"]
    args = compare.parse_args(argv)
    loaded = compare.load_model(model, progress=False)
    data = compare.sequences(args, loaded, TEXT, 64)
    decode = loaded.require_tokenizer().decode
    spelled = [decode(list(map(int, window[1:]))) for window in data]
    assert spelled == [piece.strip() for piece in TEXT.split("why")]
    assert all(window[0] == 0 for window in data)
    with pytest.raises(ValueError, match="gives no token"):
        compare.sequences(args, loaded, " ", 64)


def test_memory_only_needs_no_weights(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "small" / "config.json"
    config.parent.mkdir()
    config.write_text((model / "config.json").read_text())
    argv = f"--memory-only --configs {config} --output-dir {tmp_path} --formats bf16,int4"
    compare.main(argv.split())
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [r["model"] for r in rows] == ["small", "small"]
    plain, int4 = rows
    elements = plain["nominal_bytes"] // 2
    assert int4["nominal_bytes"] == elements // 2
    linear = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 32  # q o, k v, gate up down
    assert int4["weight_bytes"] == int4["unquantized_bytes"] + int4["scale_bytes"] + linear // 2
    assert int4["scale_bytes"] == (5 * 32 + 2 * 16) * 4  # one group of rows in every column
    assert not (tmp_path / "results.png").exists()


def test_lm_head_has_a_format_of_its_own(text: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path, tied=False)
    argv = f"--model {model} --formats bf16,int4_g32 --lm-head-format int8 --output-dir"
    score = f"--text {text} --seq-len 16 --max-tokens 30 --no-speed"
    found = []
    for name, flags in (("scored", score), ("sizes", "--memory-only")):
        compare.main([*argv.split(), str(tmp_path / name), *flags.split()])
        rows = json.loads((tmp_path / name / "results.json").read_text())
        assert [row["lm_head_format"] for row in rows] == [None, "int8"]
        found.append([row["weight_bytes"] for row in rows])
    linear = 32 * (2 * 32 + 2 * 16 + 3 * 64)
    saved = 4 * (linear + 32 * 288) - (linear // 2 + linear // 32 * 4 + 32 * 288 + 288 * 4)
    assert found[0] == found[1] and found[0][0] - found[0][1] == saved
    assert "| int4_g32 | int8 | " in (tmp_path / "scored" / "results.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "--text is needed"),
        ("--text t --memory-only", "leave --text out"),
        ("--memory-only --seq-len 64", "leave --seq-len out"),
        ("--memory-only --no-speed", "leave --no-speed out"),
        ("--memory-only --batch-size 8", "leave --batch-size out"),
        ("--memory-only --max-tokens 0", "--max-tokens 0 is too small"),
        ("--memory-only --model m --configs c", "--configs and --model m"),
        ("--text t --configs c", "needs --memory-only"),
        ("--text t --quantization-param-path s", "s: no KV cache type uses it"),
        ("--text t --formats int5", "unknown format 'int5'"),
        ("--text t --lm-head-format int5", "unknown format 'int5'"),
        ("--text t --lm-head-format int8 --formats none", "none of --formats quantizes anything"),
        ("--memory-only --lm-head-format int8", "books-9m: lm_head cannot be quantized to int8"),
        ("--text t --kv-cache-dtypes fp4", "'fp4' is unknown"),
        ("--text t --kv-cache-dtypes int8:fast", "'fast' is unknown"),
        ("--text t --batch-size 0", "--batch-size 0 is too small"),
        ("--text none.txt", "'none.txt' does not exist"),
    ],
)
def test_errors_come_before_any_work(argv: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare.main([*argv.split(), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out is a file; give a folder"):
        compare.main(["--text", "none.txt", "--output-dir", str(tmp_path / "out")])


def test_quantized_models_are_scored_as_they_are(model: Path, text: Path, tmp_path: Path) -> None:
    from qjax.checkpoints.export import save_model
    from qjax.evaluation.memory import LINEAR_KERNELS
    from qjax.formats import INT8_CHANNEL
    from qjax.quantize import quantize_tree

    loaded = compare.load_model(model, dtype=jnp.float32, progress=False)
    params = quantize_tree(loaded.params, {LINEAR_KERNELS: INT8_CHANNEL})
    quantized = tmp_path / "quantized"
    save_model(quantized, loaded.config, params, "compressed-tensors", source=model, progress=False)
    argv = f"--model {quantized} --text {text} --output-dir {tmp_path} --max-tokens 20 --no-speed"
    with pytest.raises(ValueError, match="quantized already"):
        compare.main([*argv.split(), "--formats", "int4"])
    compare.main([*argv.split(), "--formats", "none", "--seq-len", "16"])
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["scale_bytes"] > 0 and "decode_tokens_per_s" not in row


def test_lm_head_of_a_quantized_model(text: Path, tmp_path: Path) -> None:
    """A row as it is and one more; what stores lm_head quantized is an error before any row."""
    from qjax.checkpoints.export import save_model
    from qjax.formats import INT8_CHANNEL
    from qjax.quantize import quantize_tree

    model = write_model(tmp_path, tied=False)
    loaded = compare.load_model(model, progress=False)
    for pattern, out in (("model/.*/kernel", "body"), (".*/kernel", "all")):
        params = quantize_tree(loaded.params, {pattern: INT8_CHANNEL})
        folder = tmp_path / f"model-{out}"
        save_model(
            folder, loaded.config, params, "compressed-tensors", source=model, progress=False
        )
    argv = f"--text {text} --seq-len 16 --max-tokens 30 --no-speed --formats none --output-dir"
    argv = [*argv.split(), str(tmp_path / "out"), "--lm-head-format", "int8"]
    with pytest.raises(ValueError, match="none of --formats quantizes anything"):
        compare.main(["--model", str(model), *argv])
    with pytest.raises(ValueError, match=r"stores lm_head quantized already \(int8_channel\)"):
        compare.main(["--model", str(tmp_path / "model-all"), *argv])
    assert not (tmp_path / "out").exists()
    compare.main(["--model", str(tmp_path / "model-body"), *argv])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["format"], row["lm_head_format"]) for row in rows] == [
        ("none", None),
        ("none", "int8"),
    ]
    saved = 32 * 288 * 3 - 288 * 4  # codes for float32, less the scales
    assert rows[0]["weight_bytes"] - rows[1]["weight_bytes"] == saved
    assert rows[0]["kl"] < rows[1]["kl"]  # the first has a KV cache in bf16
