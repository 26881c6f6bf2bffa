"""Files of static KV cache scales, and what serve.py reads, writes and prints about them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.kv_scale_files import read_kv_scale_file, write_kv_scale_file
from qjax.checkpoints.reader import KVScales
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.serving.key_bias import leave_out_biases
from qjax.serving.kv_scales import (
    export_scales,
    kv_stats_lines,
    scales_fingerprint,
    scales_for_run,
)

CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=4,
    head_dim=2,
)
RANKED = {
    "model_type": "llama",
    "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.25, "1": 0.1}}},
}
APART = {
    "model_type": "llama",
    "num_layers": 2,
    "num_kv_heads": 4,
    "dtype": "int8",
    "layers": {
        "0": {"k_scale": [0.1, 0.2, 0.3, 4], "v_scale": 0.5},
        "1": {"k_scale": 1, "v_scale": [1e-3, 2e-3, 3e-3, 4e-3]},
    },
}
FACTORS = ("kv_cache", "scaling_factor")


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def write(folder: pathlib.Path, values: Any) -> pathlib.Path:
    path = folder / "scales.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def changed(values: Any, *path: Any, to: Any = None, drop: bool = False) -> Any:
    result = at = copy.deepcopy(values)
    for key in path[:-1]:
        at = at[key]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return result


def test_one_number_per_layer_serves_keys_and_values_of_all_heads(tmp_path):
    scales = read_kv_scale_file(write(tmp_path, RANKED), CONFIG)
    assert scales.dtype == "float8_e4m3fn"
    for part in (scales.keys, scales.values):
        assert [s.dtype for s in part] == [np.float32] * 2
        np.testing.assert_array_equal(part, f32([[0.25] * 4, [0.1] * 4]))


def test_each_rank_has_its_part_of_the_heads(tmp_path):
    values = changed(RANKED, *FACTORS, "1", to={"0": 2, "1": 3})
    scales = read_kv_scale_file(write(tmp_path, values), CONFIG)
    np.testing.assert_array_equal(scales.keys, f32([[0.25, 0.25, 2, 2], [0.1, 0.1, 3, 3]]))


def test_keys_and_values_apart_and_per_head(tmp_path):
    scales = read_kv_scale_file(write(tmp_path, APART), CONFIG)
    assert scales.dtype == "int8"
    np.testing.assert_array_equal(scales.keys, f32([[0.1, 0.2, 0.3, 4], [1] * 4]))
    want = f32([[0.5] * 4, [1e-3, 2e-3, 3e-3, 4e-3]])
    np.testing.assert_array_equal(scales.values, want)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "scales.json is not valid JSON"),
        ('{"layers": {}, "layers": {}}', "the key 'layers' stands twice"),
        ([], "the file must be a JSON object, it is a list"),
        ({"scales": 1}, "has the keys .'scales'.; expected 'kv_cache' .* or 'layers'"),
        # SGLang's layout
        (changed(RANKED, "model_type", to="qwen2"), "model_type 'qwen2', the model has 'llama'"),
        (changed(RANKED, "model_type", to=None), "model_type None, the model has 'llama'"),
        (changed(RANKED, "model_type", drop=True), "the file lacks 'model_type'"),
        (changed(RANKED, "weights", to={}), "the file has the unknown key 'weights'"),
        (changed(RANKED, "kv_cache", "dtype", to="float8_e4m3fnuz"), "dtype is 'float8_e4m3fnuz'"),
        (changed(RANKED, "kv_cache", "dtype", drop=True), "kv_cache lacks 'dtype'"),
        (changed(RANKED, *FACTORS, "0", "1", drop=True), r"factor\[0\] lacks layer 1 of 2"),
        (changed(RANKED, *FACTORS, "0", "2", to=1.0), r"factor\[0\] has layer '2'; there are 0 to"),
        (changed(RANKED, *FACTORS, "0", "00", to=1.0), "has layer '00'"),
        (changed(RANKED, *FACTORS, to={}), "has 0 tensor parallel ranks"),
        (changed(RANKED, *FACTORS, to={"0": {}, "1": {}, "2": {}}), "has 3 tensor parallel ranks"),
        (changed(RANKED, *FACTORS, to={"1": {"0": 1, "1": 1}}), "lacks rank 0 of 1"),
        (changed(RANKED, *FACTORS, "0", "1", to=0.0), r"\[0\]\[1\] is 0.0; .* positive"),
        (changed(RANKED, *FACTORS, "0", "1", to=-1), r"\[0\]\[1\] is -1; .* never measured"),
        (changed(RANKED, *FACTORS, "0", "0", to=float("nan")), r"\[0\]\[0\] is nan"),
        (changed(RANKED, *FACTORS, "0", "0", to=float("inf")), "is inf; .* finite"),
        (changed(RANKED, *FACTORS, "0", "0", to=1e39), "is 1e\\+39; .* finite in float32"),
        (changed(RANKED, *FACTORS, "0", "0", to=1e-39), "is 1e-39; .* positive .* in float32"),
        (changed(RANKED, *FACTORS, "0", "0", to=10**400), "finite in float32"),
        (changed(RANKED, *FACTORS, "0", "0", to="0.1"), "is '0.1'; a scale must be a number"),
        (changed(RANKED, *FACTORS, "0", "0", to=True), "is True; a scale must be a number"),
        (changed(RANKED, *FACTORS, "0", "0", to=[0.1, 0.2]), "a scale must be a number"),
        # ours
        (changed(APART, "model_type", to="mistral"), "model_type 'mistral', the model has 'llama'"),
        (changed(APART, "num_layers", to=3), "has num_layers 3, the model has 2"),
        (changed(APART, "num_kv_heads", to=8), "has num_kv_heads 8, the model has 4"),
        (changed(APART, "num_kv_heads", drop=True), "the file lacks 'num_kv_heads'"),
        (changed(APART, "dtype", to="bfloat16"), "dtype is 'bfloat16'; known are float8_e4m3fn"),
        (changed(APART, "dtype", to=[]), r"dtype is \[\]"),
        (changed(APART, "extra", to=1), "unknown key 'extra'"),
        (changed(APART, "layers", "0", drop=True), "layers lacks layer 0 of 2; there is no def"),
        (changed(APART, "layers", "0", to=0.1), r"layers\[0\] must be a JSON object"),
        (changed(APART, "layers", "0", "v_scale", drop=True), r"layers\[0\] lacks 'v_scale'"),
        (changed(APART, "layers", "0", "q_scale", to=1), r"layers\[0\] has the unknown key 'q_sc"),
        (changed(APART, "layers", "1", "v_scale", 2, to=0), r"layers\[1\].v_scale\[2\] is 0"),
        (changed(APART, "layers", "1", "k_scale", to=None), r"layers\[1\].k_scale is None"),
        (changed(APART, "layers", "1", "v_scale", to=[1, 2]), "has 2 numbers; the model has 4 KV"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_that_names_it(values, message, tmp_path):
    path = write(tmp_path, values)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_kv_scale_file(path, CONFIG)
    assert str(caught.value).startswith(str(path))


def test_what_is_no_text_file_is_named(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="bytes.json is not valid JSON .*invalid start byte"):
        read_kv_scale_file(tmp_path / "bytes.json", CONFIG)
    with pytest.raises(CheckpointError, match="no.json cannot be read: No such file"):
        read_kv_scale_file(tmp_path / "no.json", CONFIG)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "int4"])
def test_written_scales_are_read_back_exactly(dtype, tmp_path):
    rng = np.random.default_rng(0)
    keys = tuple(np.exp(rng.normal(size=4) * 9).astype(np.float32) for _ in range(2))
    values = (np.full(4, 0.1, np.float32), keys[0] / np.float32(3))
    path = tmp_path / "scales.json"
    write_kv_scale_file(path, KVScales(keys, values, dtype), CONFIG)
    found = read_kv_scale_file(path, CONFIG)
    np.testing.assert_array_equal(found.keys, keys)
    np.testing.assert_array_equal(found.values, values)
    assert found.dtype == dtype
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_only_scales_of_the_model_are_written(tmp_path):
    path, ones = tmp_path / "scales.json", np.ones(4, np.float32)
    with pytest.raises(ValueError, match="scales of .1, 1. layers do not fit the model's 2"):
        write_kv_scale_file(path, KVScales((ones,), (ones,), "int8"), CONFIG)
    with pytest.raises(ValueError, match="must all be"):
        write_kv_scale_file(path, KVScales((ones,) * 2, (ones[:2],) * 2, "int8"), CONFIG)
    assert not path.exists()


@pytest.mark.parametrize(
    ("kv_dtype", "mode", "skip", "message"),
    [
        ("int8", "tracked", "", "the scale mode 'tracked' does not use"),
        ("fp8_e4m3", None, "", "for a KV cache in int8, but float8_e4m3fn is asked for"),
        ("bf16", None, "", "for a KV cache in int8, but bfloat16 is asked for"),
        ("auto", None, "0,-1", "no layer is left to use them: '0,-1' skips all"),
    ],
)
def test_choices_that_leave_no_use_for_the_file_are_refused(
    kv_dtype, mode, skip, message, tmp_path
):
    path = write(tmp_path, APART)
    with pytest.raises(ValueError, match=message):
        scales_for_run(path, CONFIG, kv_dtype=kv_dtype, mode=mode, skip_layers=skip)


def test_the_fingerprint_follows_the_numbers(tmp_path):
    def print_of(values: Any) -> str | None:
        path = write(tmp_path, values)
        choices = {"kv_dtype": "auto", "mode": "static", "skip_layers": "1"}
        return scales_fingerprint(scales_for_run(path, CONFIG, **choices))

    other = changed(APART, "layers", "1", "v_scale", 3, to=5e-3)
    assert print_of(APART) == print_of(APART) != print_of(other)
    assert scales_fingerprint(None) is None


def seen_cache(*formats: KVFormat) -> QuantizedKVCache:
    """A cache that counts and magnitudes are put into by hand."""
    cache = QuantizedKVCache.init(
        num_layers=2,
        num_kv_heads=4,
        head_dim=2,
        num_pages=1,
        page_size=1,
        max_seqs=1,
        pages_per_seq=1,
        fmt=formats,
    )
    absmax = f32([[[1, 2, 0, 3], [4, 4, 4, 4]], [[10, 20, 30, 12345], [5, 6, 7, 8]]])
    return dataclasses.replace(
        cache,
        layer_absmax=tuple(jnp.asarray(x) for x in absmax),
        layer_saturated=(jnp.asarray([0, 1234], jnp.int32), jnp.asarray([2**31 - 1, 0], jnp.int32)),
        layer_underflowed=(jnp.asarray([0, 8], jnp.int32), jnp.asarray([2**31 - 1, 4], jnp.int32)),
    )


@pytest.mark.parametrize(
    ("formats", "dtype", "bound"),
    [
        ((KVFormat("bfloat16"), KVFormat("int8", "tracked")), "int8", 127),
        ((KVFormat("bfloat16"), KVFormat("bfloat16")), "float8_e4m3fn", 448),
    ],
)
def test_export_covers_every_layer(formats, dtype, bound, tmp_path):
    path = tmp_path / "scales.json"
    assert export_scales(path, seen_cache(*formats), CONFIG) == dtype
    scales = read_kv_scale_file(path, CONFIG)
    assert scales.dtype == dtype
    # A head that saw nothing has its layer's largest scale.
    want = f32([[1, 2, 3, 3], [10, 20, 30, 12345]]) / np.float32(bound)
    np.testing.assert_array_equal(scales.keys, want)
    assert json.loads(path.read_text())["layers"]["0"]["v_scale"] == float(np.float32(4 / bound))


def test_statistics_are_a_table():
    lines = kv_stats_lines(seen_cache(KVFormat("bfloat16"), KVFormat("int8", "tracked")), 100)
    assert lines[0].startswith("KV cache, per layer, of 800 keys (K)")
    assert [line.split() for line in lines[3:]] == [
        ["0", "bf16", "0", "1,234", "0.000%", "1.000%", "3", "4"],
        ["1", "int8-tracked", ">=2,147,483,647", "0", ">=268435455.875%", "0.500%"]
        + ["1.234e+04", "8"],
    ]


def test_exported_files_tell_what_was_lost_and_how_keys_were_measured(tmp_path):
    path = tmp_path / "scales.json"
    apart = KVFormat("int8", "tracked", without_key_bias=True)
    export_scales(path, seen_cache(KVFormat("int8", "tracked"), apart), CONFIG)
    layers = json.loads(path.read_text())["layers"]
    assert layers["0"]["saturated"] == [0, 1234] and layers["0"]["underflowed"] == [0, 8]
    assert "k_bias" not in layers["0"] and layers["1"]["k_bias"] == "apart"
    scales = read_kv_scale_file(path, CONFIG)
    assert scales.without_key_bias == (1,)
    kept = dataclasses.replace(scales, without_key_bias=())
    assert scales_fingerprint(scales) != scales_fingerprint(kept)
    layers["1"]["k_bias"] = "kept"
    with pytest.raises(CheckpointError, match=r"layers\[1\].k_bias is 'kept'; it must be 'apart'"):
        read_kv_scale_file(
            write(tmp_path, json.loads(path.read_text()) | {"layers": layers}), CONFIG
        )
    # Here no bias is an outlier, so the scales are too small.
    static = (KVFormat("int8", "static"),) * 2
    with pytest.raises(ValueError, match="layer 1: the static key scales were measured on keys"):
        leave_out_biases(static, {}, CONFIG, scales)
    assert leave_out_biases(static, {}, CONFIG, kept) == (static, [])
