"""Formats under a byte budget."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.plan import plan_formats
from qjax.calibration import init_hessian, update_hessian
from qjax.calibration.mixed_precision import choose_formats, sensitivity, stored_bits
from qjax.formats import INT4_G32_ASYM, INT4_G128, INT8_CHANNEL, QuantFormat
from tests.calibration.problems import K, layer


def test_choice_is_near_the_best_of_all_and_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    bits = np.asarray([[30, 40, 80]]) * rng.integers(1, 5, (6, 1))
    errors = rng.random((6, 1)) * np.asarray([[0.3, 0.1, 0.001]]) * rng.uniform(0.8, 1.2, (6, 3))
    rows = np.arange(6)
    for budget in range(int(bits[:, 0].sum()), int(bits[:, 2].sum()) + 1, 60):
        chosen = choose_formats(errors, bits, budget)
        assert bits[rows, chosen].sum() <= budget
        best = min(
            errors[rows, list(c)].sum()
            for c in itertools.product(range(3), repeat=6)
            if bits[rows, list(c)].sum() <= budget
        )
        # The greedy rule may miss the optimum by its last step.
        assert errors[rows, chosen].sum() <= best + errors.max()
    assert (choose_formats(errors, bits, 10**9) == 2).all()
    with pytest.raises(ValueError, match="cheapest formats take"):
        choose_formats(errors, bits, int(bits[:, 0].sum()) - 1)


def test_bits_count_scales_and_zero_points() -> None:
    assert stored_bits((256, 10), INT4_G128) == 2560 * 4 + 20 * 32
    asym = INT4_G32_ASYM.replace(scale_dtype="bfloat16")
    assert stored_bits((256, 10), asym) == 2560 * 4 + 80 * (16 + 4)


def test_plan_gives_more_bits_to_the_layers_that_need_them() -> None:
    candidates = (INT4_G128, INT8_CHANNEL)
    errors = {"a": [0.01, 0.0], "b": [0.2, 0.0], "c": [0.02, 0.0]}
    shapes = dict.fromkeys(errors, (256, 256))
    plan = plan_formats(errors, shapes, candidates, target_bits=5.8)
    assert plan == {"a": INT4_G128, "b": INT8_CHANNEL, "c": INT4_G128}
    with pytest.raises(ValueError, match="4.250 bits per weight of the smallest"):
        plan_formats(errors, shapes, candidates, target_bits=4.0)


def test_sensitivity_falls_with_bits() -> None:
    w, x = layer()
    stats = update_hessian(init_hessian(K), jnp.asarray(x))
    g16 = QuantFormat("int4", "group", group_size=16)
    low, high = (float(sensitivity(jnp.asarray(w), stats, f)) for f in (g16, INT8_CHANNEL))
    assert 0 < high < 0.02 * low < 0.02
