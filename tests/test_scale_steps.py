"""Scales that are whole multiples of a step per column (``QuantFormat.scale_steps``)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from qjax import calibration, numerics
from qjax.calibration.learned_rounding import Rounding
from qjax.checkpoints.checksums import json_sum
from qjax.checkpoints.native import MANIFEST, load_native, save_native
from qjax.formats import QuantFormat
from qjax.models.fusion import fuse_kernels
from qjax.numerics import find_scale_step
from qjax.quantized_array import QuantizedArray
from qjax.training import qat
from tests.calibration.problems import layer
from tests.checkpoint_models import TINY, assert_same_tree, random_params
from tests.fake_checkpoints import LAYER, read_layer
from tests.test_compressed_tensors import CompressedTensorsWriter, Linears, reader_of

STEPS = 16
FMT = qjax.W4A8_INT8.replace(group_size=16)
FREE = FMT.replace(scale_steps=None)
W, X = (jnp.asarray(x) for x in layer())  # 40 rows: the last group is cut short


def multiples(scale: Any, steps: int = STEPS) -> np.ndarray:
    """The multiples of some step that the scales are, to the last bit."""
    step, exact = jax.jit(find_scale_step, static_argnums=1)(jnp.asarray(scale), steps)
    assert bool(exact.all())
    found = np.asarray(scale, np.float64) / np.asarray(step, np.float64)
    np.testing.assert_array_equal(found, np.rint(found))
    assert found.min() >= 1 and found.max() <= steps
    return found


@pytest.fixture(scope="module")
def stats() -> calibration.HessianStats:
    return calibration.update_hessian(calibration.init_hessian(W.shape[0]), X)


METHODS: dict[str, Callable[[Any], QuantizedArray]] = {
    "rtn": lambda stats: qjax.quantize(W, FMT),
    "clipped": lambda stats: calibration.quantize_clipped(W, stats, FMT),
    "gptq": lambda stats: calibration.gptq_quantize(W, stats, FMT)[0],
    "gptq_range": lambda stats: calibration.gptq_quantize(W, stats, FMT, search=False)[0],
    "gptq_static": lambda stats: calibration.gptq_quantize(W, stats, FMT, order="static")[0],
    "refined": lambda stats: calibration.refine(W, qjax.quantize(W, FMT), stats, sweeps=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_calibrated_scales_are_multiples(name: str, stats: Any) -> None:
    q = METHODS[name](stats)
    assert q.fmt == FMT and q.scale.shape == (3, W.shape[1]) and q.scale.dtype == jnp.float32
    found = multiples(q.scale)
    assert len(np.unique(found)) > 4
    # The step is that of the original range: multiples of the very same one.
    step = np.asarray(qjax.quantize(W, FMT).scale.max(0) / STEPS)
    np.testing.assert_array_equal(np.rint(np.asarray(q.scale) / step) * step, q.scale)


def test_refinement_moves_scales_and_lowers_the_error(stats: Any) -> None:
    start = qjax.quantize(W, FMT)
    better = METHODS["refined"](stats)
    assert (np.asarray(better.scale) != np.asarray(start.scale)).any()
    errors = [calibration.output_error(W, q.dequantize(), stats) for q in (better, start)]
    assert float(errors[0]) < float(errors[1])


@pytest.mark.parametrize("offsets", [True, False])
def test_learned_scales_are_multiples(offsets: bool, rng: np.random.Generator) -> None:
    start = qjax.quantize(W, FMT)
    grid, learned = calibration.init_rounding(W if offsets else None, start)
    np.testing.assert_array_equal(calibration.finish_rounding(grid, learned).scale, start.scale)
    # One number per column: steps are learned, multiples are not.
    stretch = jnp.asarray(rng.uniform(0.2, 2.0, (1, W.shape[1])).astype(np.float32))
    assert learned.stretch.shape == stretch.shape
    moved = Rounding(learned.offset, stretch)
    result = calibration.finish_rounding(grid, moved)
    np.testing.assert_array_equal(multiples(result.scale), multiples(start.scale))
    np.testing.assert_allclose(result.scale, start.scale * stretch, rtol=2.0**-18)
    np.testing.assert_allclose(calibration.rounded(grid, moved), result.dequantize(), rtol=1e-6)
    grads = jax.grad(lambda a: calibration.rounded(grid, Rounding(moved.offset, a)).sum())(stretch)
    assert bool(jnp.all(jnp.isfinite(grads))) and float(jnp.abs(grads).max()) > 0


def test_scales_of_quantization_aware_training_are_multiples(rng: np.random.Generator) -> None:
    plain = {"model": {"layers_0": {"mlp": {"up_proj": {"kernel": W}}}}}
    params = qat.add_scales(plain, FMT)
    node = params["model"]["layers_0"]["mlp"]["up_proj"]
    start = multiples(node[qat.MULTIPLE])
    moves = rng.uniform(-0.5, 0.5, (1, W.shape[1])).astype(np.float32)  # of the steps
    node[qat.LOG_SCALE] = node[qat.LOG_SCALE] + jnp.asarray(moves)

    def kernel(tree: Any) -> Any:
        return tree["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]

    def value(log_scale: jax.Array, multiple: jax.Array) -> jax.Array:
        return qat.learned_step(W, log_scale, None, FMT, multiple)

    trained = qat.quantize_trained(params, FMT, jnp.float32)
    np.testing.assert_array_equal(multiples(kernel(trained).scale), start)
    scales = node[qat.LOG_SCALE], node[qat.MULTIPLE]
    np.testing.assert_allclose(value(*scales), kernel(trained).dequantize(), rtol=1e-6)
    grads, none = jax.grad(lambda *x: (value(*x) * W).sum(), argnums=(0, 1))(*scales)
    assert bool(jnp.all(jnp.isfinite(grads))) and float(jnp.abs(grads).max()) > 0
    np.testing.assert_array_equal(none, 0)
    # From a quantized checkpoint: the same codes and scales.
    again = qat.quantize_trained(qat.add_scales(trained, FMT), FMT, jnp.float32)
    assert_same_tree(again, trained)
    with pytest.raises(ValueError, match="training is for int4_g16x16"):
        qat.add_scales(qat.quantize_trained(plain, FREE, jnp.float32), FMT)


def test_errors_are_close_to_those_of_free_scales(rng: np.random.Generator) -> None:
    """A scale ``s`` moves by up to half a step ``d``: errors by ``d / 4``, cut-off by ``3.5 d``.

    On average the largest weight of each group, exact with free scales, gets an error as the other
    15 have; all else is small beside that: ``s`` is some ``12 d``.
    """
    w = jnp.asarray(rng.normal(size=(512, 64)).astype(np.float32))
    whole, free = qjax.quantize(w, FMT), qjax.quantize(w, FREE)
    step = np.asarray(free.scale.max(0) / STEPS)
    scale = np.repeat(np.asarray(free.scale), 16, axis=0)
    errors = [np.abs(np.asarray(q.dequantize() - w)) for q in (whole, free)]
    bound = np.maximum(scale / 2 + step / 4, 3.5 * step)
    assert (errors[0] <= bound * (1 + 1e-5)).all()
    assert np.square(errors[0]).mean() < 16 / 15 * np.square(errors[1]).mean()


def test_unusual_values() -> None:
    """What qjax/numerics.py states, for columns of three groups."""
    base = np.linspace(-1, 1, 48, dtype=np.float32)
    columns = np.tile(base[:, None], (1, 8))
    columns[:, 0] = 0
    columns[16:32, 1] = 0
    columns[:, 2] = base * np.float32(1e-30)
    columns[:, 3] = base * np.float32(1e30)
    columns[5, 4], columns[6, 4] = np.inf, -np.inf
    columns[5, 5] = np.nan
    columns[16:32, 6] = base[16:32] * np.float32(1e-30)
    columns[:, 7] = base * np.float32(1e-37)  # over 16 below the smallest normal number: zeros
    q = jax.jit(lambda x: qjax.quantize(x, FMT))(jnp.asarray(columns))
    multiples(q.scale)
    out, scale = np.asarray(q.dequantize()), np.asarray(q.scale)
    assert np.isfinite(out).all() and (scale > 0).all()
    np.testing.assert_array_equal(out[:, 0], 0)
    np.testing.assert_array_equal(scale[:, 0], 1)
    np.testing.assert_array_equal(out[16:32, [1, 6]], 0)  # but with the step as their scale
    np.testing.assert_allclose(scale[1, [1, 6]], scale[0, 1] / STEPS, rtol=1e-5)
    for column, unit in ((2, 1e-30), (3, 1e30)):
        half = scale[0, column] * (0.5 + 1e-5)
        assert np.abs(out[:, column] - columns[:, column]).max() <= half and half < 0.08 * unit
    assert out[5, 4] == -out[6, 4] == np.float32(7) * scale[0, 4] and scale[0, 4] < 0.15
    assert out[5, 5] == 0
    np.testing.assert_array_equal(out[16:, [4, 5]], out[16:, [5, 5]])
    np.testing.assert_array_equal(out[:, 7], 0)
    assert (scale[:, 7] == 1).all()


def test_transformations(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(2, 40, 12)).astype(np.float32))
    stacked = qjax.quantize(x, FMT)
    for other in (
        jax.vmap(lambda x: qjax.quantize(x, FMT))(x),
        jax.tree.map(lambda *a: jnp.stack(a), *(qjax.quantize(part, FMT) for part in x)),
    ):
        assert_same_tree(other, stacked)
    assert_same_tree(qjax.quantize(x[0].T, FMT, axis=-1).T, qjax.quantize(x[0], FMT))
    shapes = jax.eval_shape(lambda x: qjax.quantize(x, FMT), x[0])
    assert shapes.scale.shape == (3, 12) and shapes.scale.dtype == jnp.float32


@pytest.mark.parametrize(("qtype", "steps"), [("int2", 64), ("int3", 32), ("int4", 16)])
def test_steps_are_found_again(qtype: str, steps: int, rng: np.random.Generator) -> None:
    """Of any multiples, and in spite of the errors of XLA's division."""
    assert QuantFormat(qtype, "group", group_size=16, scale_steps=steps).scale_steps == steps
    step = numerics.round_step(jnp.asarray(np.exp(rng.normal(size=(1, 500)) * 20), jnp.float32))
    for direction in (0.0, np.inf):
        near = np.asarray(step)
        for _ in range(2):
            near = np.nextafter(near, np.float32(direction))
        np.testing.assert_array_equal(numerics.round_step(jnp.asarray(near)), step)
    chosen = rng.integers(1, steps + 1, (5, 500))
    chosen[:, 0], chosen[:, 1] = steps - 1, 1
    scale = step * jnp.asarray(chosen, jnp.float32)
    np.testing.assert_array_equal(  # exact in float64, so exact in float32
        np.asarray(scale, np.float64), np.asarray(step, np.float64) * chosen
    )
    multiples(scale, steps)
    free = jnp.asarray(rng.uniform(0.5, 1, (5, 500)).astype(np.float32))
    assert not bool(find_scale_step(free, steps)[1].any())


def test_parts_of_columns_and_joined_columns(stats: Any) -> None:
    """Shards of the contraction axis hold some groups only; projections are joined along ``n``."""
    w = jnp.concatenate([W[:32]] * 2) * jnp.asarray(np.repeat([1, 3], 32)[:, None], jnp.float32)
    q = qjax.quantize(w, FMT)
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    cut = jax.device_put(q.scale, NamedSharding(mesh, PartitionSpec("model", None)))
    for shard in cut.addressable_shards:
        assert shard.data.shape == (1, w.shape[1])
        multiples(np.asarray(shard.data))
    multiples(q.scale[:2])
    multiples(fuse_kernels([q, qjax.quantize(5 * w, FMT)]).scale)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_steps": 1}, "from 2 to 16: a code times a multiple must fit int8"),
        ({"scale_steps": 2.5}, "scale_steps=2.5 of int4 must be a whole number"),
        ({"scale_steps": "4"}, "scale_steps='4' of int4 must be a whole number"),
        ({"scale_steps": 17}, "from 2 to 16"),
        ({"qtype": "int8"}, "only symmetric integers of fewer than 8 bits in groups"),
        ({"scale_dtype": "bfloat16"}, "use scale_dtype='float32', or scale_steps=None"),
        ({"symmetric": False}, "only symmetric integers"),
        ({"granularity": "channel", "group_size": None}, "only symmetric integers"),
        ({"qtype": "float8_e4m3fn"}, "only symmetric integers"),
    ],
)
def test_meaningless_formats_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FMT.replace(**fields)


def test_native_checkpoints_keep_the_field(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(TINY, num_layers=1, layer_windows=(None,))

    def tree(fmt: QuantFormat) -> Any:
        def kernel(leaf: Any, seed: int) -> Any:
            x = np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32)
            return qjax.quantize(jnp.asarray(x), fmt, dtype=jnp.float32)

        return jax.tree.map(jnp.asarray, random_params(config, kernel))

    params = tree(FMT)
    save_native(tmp_path / "new", config, params)
    assert_same_tree(load_native(tmp_path / "new").params, params)
    # Files from before the field: without it scales are free.
    free = tree(FREE)
    save_native(tmp_path / "old", config, free)
    path = tmp_path / "old" / MANIFEST
    text = path.read_text()
    assert text.count('"scale_steps"') > 0
    manifest = _without(json.loads(text), "scale_steps")
    del manifest["checksum"]
    path.write_text(json.dumps({**manifest, "checksum": json_sum(manifest)}))
    assert_same_tree(load_native(tmp_path / "old").params, free)


def _without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, name) for k, v in value.items() if k != name}
    return [_without(v, name) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("fmt", [FMT, FREE, FREE.replace(scale_dtype="bfloat16")])
def test_compressed_tensors_hold_multiples_exactly(fmt: QuantFormat) -> None:
    """Files do not name steps; they are found in the scales, and only where they are."""
    q = qjax.quantize(W, fmt)
    writer = CompressedTensorsWriter(Linears({LAYER: q}, {}))
    assert writer.config()["config_groups"].keys() == {"group_0"}
    tensors = dict(writer.tensors(LAYER, q))
    back = read_layer(reader_of(writer.config(), tensors), tensors, (W.shape[0], W.shape[1]))
    assert back.fmt == fmt
    np.testing.assert_array_equal(back.scale, q.scale)
    mixed = Linears({LAYER: q, f"{LAYER}2": qjax.quantize(W, FREE)}, {})
    assert len(CompressedTensorsWriter(mixed).config()["config_groups"]) == 1
