from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats import parse_format
from qjax.kv_format import parse_kv_format
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.sharding import placer, tensor_parallel_mesh
from qjax.ops.kv import decode_codes
from qjax.quantize import dequantize, quantized_nbytes
from qjax.serving.synthetic import SHAPES, random_cache, random_params, step_bytes
from scripts import bench_decode

ROOT = pathlib.Path(bench_decode.__file__).resolve().parent.parent
TINY = SHAPES["tiny"]
SMALL = ["--shape", "tiny", "--context", "16", "--steps", "2", "--blocks", "1", "--repeats", "1"]


@functools.cache
def params_of(name: str) -> Any:
    return random_params(TINY, parse_format(name))


def test_a_row_per_batch_size(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = tmp_path / "rows.jsonl"
    flags = ["--formats", "int4", "--batch-sizes", "2", "--kv-cache-dtype", "int8"]
    flags += ["--lm-head-format", "fp8"]
    assert bench_decode.main([*SMALL, *flags, "--output", str(output)]) == 0
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    assert row["lm_head_format"] == "fp8"
    saved = 128 * 512 - 512 * 4  # of 16 bits, less the scales
    assert row["weight_bytes"] == quantized_nbytes(params_of("int4")) - saved
    assert row["error"] is None and row["batch"] == 2 and row["kv_cache_dtype"] == "int8-tracked"
    assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms_per_step"])
    assert row["step_bytes"] > row["weight_bytes"] / 2
    assert "| int4, lm_head fp8 | int8-tracked | 2 |" in capsys.readouterr().out


def test_the_baseline_keeps_its_lm_head(monkeypatch):
    args = bench_decode.parse_args([*SMALL, "--lm-head-format", "int8"])
    given = []
    monkeypatch.setattr(
        bench_decode, "run_isolated", lambda script, flags, limit: given.append(flags) or ([], "")
    )
    rows = [row for name in ("bf16", "int4") for row in bench_decode.run_format(args, name)]
    assert [row.lm_head_format for row in rows] == [None, None, "int8", "int8"]
    heads = [bench_decode.parse_args(flags).lm_head_format for flags in given]
    assert heads == ["none", "int8"]


def test_over_two_devices():
    """Weights are made where they lie."""
    flags = ["--formats", "int4_g32", "--batch-sizes", "2"]
    args = bench_decode.parse_args([*SMALL, *flags, "--tp-size", "2"])
    bench_decode.check(args)
    mesh = tensor_parallel_mesh(2)
    params = random_params(TINY, parse_format("int4_g32"), place=placer(TINY, mesh))
    row = bench_decode.measure(args, "int4_g32", 2, params, mesh)
    assert row.devices == 2 and row.weight_bytes == quantized_nbytes(params_of("int4_g32"))
    for refused in (["--tp-size", "4"], ["--tp-size", "0"], ["--tp-size", "2", "--kernels", "3"]):
        assert bench_decode.main([*SMALL, *flags, *refused]) == 2


def test_a_slow_format_does_not_stop_the_others(capsys):
    flags = ["--formats", "fp8,int8", "--batch-sizes", "1,2", "--time-limit", "0.01"]
    assert bench_decode.main([*SMALL, *flags]) == 1
    out = capsys.readouterr().out
    assert out.count("not finished within --time-limit 0.01 s") == 8  # 4 rows, as JSON and table
    assert "| int8 | bf16 | 2 |" in out


def test_kernels_of_a_step(capsys):
    if jax.devices()[0].platform != "gpu":
        assert bench_decode.main([*SMALL, "--formats", "int4", "--kernels", "3"]) == 1
        assert "--kernels needs a GPU" in capsys.readouterr().out
    kernels = [("gemm", 4, 1.2e-3), ("norm" * 30, 8, 0.4e-3)]
    row = bench_decode.Row("tiny", "int4", "bf16", 1, 16, "auto", ms_per_step=0.5, kernels=kernels)
    text = "\n".join(bench_decode.kernel_table(row, 4))
    assert "a step of 500 us" in text
    assert "| gemm | 1 | 300.00 | 300.0 | 60.0% |" in text
    assert "| others, and none | | | 100.0 | 20.0% |" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "int5"], "unknown format 'int5'"),
        (["--lm-head-format", "int5"], "unknown format 'int5'"),
        (["--lm-head-format", "fp8", "--formats", "bf16,none"], "none of --formats quantizes any"),
        (["--batch-sizes", "1,x"], "--batch-sizes '1,x' must be numbers"),
        (["--kv-cache-dtype", "int5"], "'int5' is unknown"),
        (["--kernels", "-1"], "--kernels -1 must not be negative"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--kv-scale-mode", "static"], "--kv-cache-dtype bf16 has no scales"),
        (["--time-limit", "nan"], "--time-limit nan must be 0 or more"),
        (["--output", "/no/such/rows.jsonl"], "--output /no/such/rows.jsonl: no such folder"),
        (["--context", "16", "--steps", "40"], "--context 16 must lie between"),
    ],
)
def test_mistakes(flags, message, capsys):
    assert bench_decode.main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bf16", "int4_g32_asym", "fp8_block"])
def test_random_weights_look_like_weights(name):
    fmt, params = parse_format(name), params_of(name)
    kernel = params["model"]["layers_1"]["mlp"]["down_proj"]["kernel"]
    values = np.asarray(dequantize(kernel, jnp.float32))
    assert values.shape == (256, 128)
    assert 0.015 < values.std() < 0.03 and abs(values.mean()) < 0.005
    other = params["model"]["layers_0"]["mlp"]["down_proj"]["kernel"]
    assert (values != np.asarray(dequantize(other, jnp.float32))).mean() > 0.5
    if fmt is not None:
        assert kernel.fmt == fmt
    assert params["lm_head"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "mode"), [("bf16", "tracked"), ("fp8_e5m2", "static"), ("int4", "tracked")]
)
def test_random_cache_is_filled(name, mode):
    fmt = parse_kv_format(name, mode=mode, model_dtype=jnp.bfloat16)
    cache = random_cache(TINY, fmt, batch=2, length=20, page_size=8)
    values = np.asarray(decode_codes(cache.values[1], fmt, jnp.float32))
    if fmt.quantized:
        scales = cache.value_scales[1]
        assert scales is not None
        values = values * np.asarray(scales).reshape(-1, 2, 1 if mode == "static" else 8, 1)
    assert 0.9 < values.std() < 1.1
    assert sorted(np.asarray(cache.page_table).ravel()) == list(range(6))


def test_bytes_of_a_step():
    params = params_of("bf16")
    fmt = parse_kv_format("int8", model_dtype=jnp.bfloat16)
    cache = random_cache(TINY, fmt, batch=2, length=16, page_size=8)
    untouched_rows = (512 - 2) * 128 * 2
    cached = 2 * 10 * 2 * 2 * 2 * (32 + 4)  # sequences, tokens, layers, k and v, heads, bytes
    assert step_bytes(params, cache, 2, 10) == quantized_nbytes(params) - untouched_rows + cached


def test_published_shapes():
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def count(config: ModelConfig, layers: int) -> int:
        config = dataclasses.replace(config, num_layers=layers, layer_windows=())
        shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))

    for name, billions in (("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6), ("qwen3-8b", 8.19)):
        config = SHAPES[name]
        one, two = count(config, 1), count(config, 2)  # tracing all 80 layers takes seconds
        total = one + (config.num_layers - 1) * (two - one)
        assert total / 1e9 == pytest.approx(billions, abs=0.06)


def test_float16():
    flags = ["--formats", "int4_g32", "--batch-sizes", "2", "--dtype", "float16"]
    args = bench_decode.parse_args([*SMALL, *flags])
    bench_decode.check(args)
    params = random_params(TINY, parse_format("int4_g32"), jnp.float16)
    row = bench_decode.measure(args, "int4_g32", 2, params, None)
    assert row.error is None and (row.dtype, row.kv_cache_dtype) == ("float16", "f16")
    assert "| int4_g32, float16 | f16 | 2 |" in bench_decode.table([row])[2]


def test_float16_rows(capsys, tmp_path, monkeypatch):
    refused = {
        ("--formats", "bf16,int4"): "bf16 is none",
        ("--formats", "w8a8_fp8"): "w8a8_fp8 is none",
        ("--formats", "int4", "--dtype", "float16"): "a bfloat16 model on one device",
        ("--formats", "int4", "--backend", "xla"): "leave out --dtype, --backend",
    }
    for flags, message in refused.items():
        assert bench_decode.main([*SMALL, "--norm-dtype", "float16", *flags]) != 0
        assert message in capsys.readouterr().err
    if jax.devices()[0].platform == "gpu":
        return
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = tmp_path / "rows.jsonl"
    flags = ["--formats", "int4", "--norm-dtype", "float16", "--batch-sizes", "1"]
    bench_decode.main([*SMALL, *flags, "--output", str(output)])
    (row,) = map(json.loads, output.read_text().splitlines())
    assert "norm_dtype=float16 is for kernels: " in row["error"]
