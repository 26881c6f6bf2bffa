"""Every tolerance used in the tests, with its reason.

Errors are relative Frobenius errors ``|out - ref| / |ref|`` unless a name says otherwise.
"""

from __future__ import annotations

import numpy as np

F32_SUM = 2e-6
"""Same float32 operands, other summation order: sqrt(k) * 2**-24 for k up to 1,000, doubled."""

F32_SUM_GPU = 5e-5
"""Exact 16-bit operands summed by tensor cores, which cut off instead of rounding: up to 2**-23 of
the sum after each step of 16, all in one direction, for 400 steps (k of 6,400 in one split)."""

BF16_OUTPUT = 2.5e-3
"""One rounding of the result to bfloat16: uniform in +-2**-9 relative, 1.65e-3 mean square."""

BF16_ELEMENT = 1.01 * 2.0**-8
"""Every element of a bfloat16 result by itself: rounded once from an exact float32 value."""

BF16_OPERANDS = 5e-3
"""Operands rounded to bfloat16 (1.65e-3 each) and the result as well."""

ATTENTION_BF16 = 4e-3
"""Exact operands; probabilities and result rounded to bfloat16 once each: 1.65e-3 * sqrt(2), with
room for one peaked row, where the errors of the probabilities do not average out."""

KEY_BIAS_TF32 = 8e-6
"""Largest error over largest sum, of 384 products of parts of 11 bits: what is left out and what
tensor cores cut off after each step of 8 of the large terms, 2**-23 each, for 16 steps, with as
much again for terms larger than their sum."""

ATTENTION_F16 = 5e-4
"""The same in float16: three mantissa bits more."""

F16_WEIGHTS = 5e-4
"""Weights rounded once to float16, everything else exact: each is off by at most 2**-11."""

F16_ZERO_POINTS = 1.2e-3
"""The same (at its usual 2**-11 / sqrt(3)) where a zero point's offset of up to 16 steps, rounded
to float16 (+-2**-8 of a step), meets weights of 3.5 steps mean square: 2**-8 / sqrt(3) / 3.5. An
offset is shared by its group, so for one row these errors do not average out: 6.5e-4, and half of
that again twice over."""


def fp8_sum(k: int) -> float:
    """Products of fp8 operands summed by Hopper's tensor core alone.

    Its adder aligns 32 products and the running sum to the largest of them and cuts off after some
    13 fraction bits, in steps of 32: a walk of ``k / 32`` steps, each off by up to 2**-13 of the
    sum. Simulated so for normal operands: 2.3e-3 for k = 4096 and 4.3e-3 for 14336, which is
    ``1.7 * 2**-13 * sqrt(k / 32)``; measured on an H200: 1.3e-3 and 2.9e-3. The fp8 rounding of the
    operands themselves costs ten times as much.
    """
    return 2.0**-12 * (k / 32) ** 0.5


FP8_PROMOTED_SUM = 7e-4
"""The same, added up outside the tensor core every 128 of k: a walk of four steps (simulated
4e-4), whose errors are independent and do not grow with k."""

F32_LOGITS = 1e-4
"""Largest difference of float32 logits of a whole model from another implementation: some 1e2
roundings of 2**-24 on activations and logits of magnitude 10."""

PUBLISHED_PERPLEXITY = 1e-3
"""Relative difference of a perplexity from another implementation's figure of five digits, with
activations and KV cache quantized: a sum in another order moves single values to the next code."""

F32_SCORE = 1e-5
"""Relative difference of a sum of negative log likelihoods in float32: logits off by F32_LOGITS in
either direction, averaged over tokens."""


TENSOR_PARALLEL_BF16 = 2e-2
"""Logits of two layers in bfloat16, each of whose four sums over devices adds parts rounded to
bfloat16 where one device rounds the sum: 1.65e-3 each, which norms and e4m3 keys, whose codes may
then differ by a step of 2**-3, carry on; ten such roundings."""


def relative_error(out: object, ref: object) -> float:
    """``|out - ref| / |ref|`` in float64; NaN never passes a ``<`` comparison."""
    out64, ref64 = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    assert out64.shape == ref64.shape, (out64.shape, ref64.shape)
    return float(np.linalg.norm(out64 - ref64) / max(float(np.linalg.norm(ref64)), 1e-30))
