"""Logits from a quantized ``lm_head`` of real vocabularies on the GPU, packed as for serving."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import parse_format
from qjax.ops.dot import quantized_dot
from qjax.quantize import quantize
from qjax.serving.synthetic import SHAPES, random_params
from qjax.serving.weights import prepare_weights
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu

WIDTH = 512
TOLERANCES = {
    "int8": tolerances.F32_SUM_GPU,
    "fp8": tolerances.F32_SUM_GPU,
    "int4": tolerances.F32_SUM_GPU,
    "w8a8_int8": tolerances.F32_SUM_GPU,
    "w8a8_fp8": tolerances.fp8_sum(WIDTH),
}


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("vocabulary", [128256, 151936, 32000])
@pytest.mark.parametrize("name", TOLERANCES)
def test_logits(name: str, vocabulary: int, rng: np.random.Generator) -> None:
    config = dataclasses.replace(SHAPES["tiny"], hidden_size=WIDTH, vocab_size=vocabulary)
    params = random_params(config, None, head=parse_format(name))
    kernel = params["lm_head"]["kernel"]
    weight = np.asarray(kernel.dequantize(jnp.float32))
    params, note = prepare_weights(params, jnp.bfloat16)
    assert note.startswith("1 of 1 quantized matrices use") and "lm_head" not in note
    head = params["lm_head"]["kernel"]
    run = jax.jit(lambda x: quantized_dot(x, head, out_dtype=jnp.float32, backend="mosaic_gpu"))
    for rows in (1, 64):
        x = jnp.asarray(rng.standard_normal((rows, WIDTH), np.float32), jnp.bfloat16)
        exact = np.asarray(x, np.float32)
        if kernel.fmt.activation is not None:
            exact = quantize(x, kernel.fmt.activation, axis=-1).dequantize(jnp.float32)
        out = run(x)
        assert out.dtype == jnp.float32
        assert relative_error(out, np.asarray(exact) @ weight) < TOLERANCES[name]
        assert (out == run(x)).all()
