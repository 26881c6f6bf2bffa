"""Small layers with correlated inputs, and the paper's algorithm in float64."""

from __future__ import annotations

import numpy as np

from qjax.formats import QuantFormat

K, N, TOKENS = 40, 24, 400


def layer(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(K, N)`` with heavy tails and inputs ``(TOKENS, K)`` that are correlated."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(K, K)) * np.exp(rng.normal(size=(1, K)))
    x = rng.normal(size=(TOKENS, K)) @ mixing / 6
    return rng.standard_t(4, size=(K, N)).astype(np.float32), x.astype(np.float32)


def reference_gptq(
    w: np.ndarray, hessian: np.ndarray, fmt: QuantFormat, *, damping: float, act_order: bool
) -> np.ndarray:
    """GPTQ as published, row by row with explicit inverses; act-order with static groups."""
    w, h = w.astype(np.float64).copy(), hessian.astype(np.float64)
    k = len(w)
    size = fmt.group_size or k
    h = h + damping * np.mean(np.diag(h)) * np.eye(k)

    def params(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        if fmt.symmetric:
            return np.maximum(-low, high) / fmt.qmax, np.zeros(rows.shape[1])
        scale = (high - low) / (fmt.qmax - fmt.qmin)
        return scale, np.clip(np.rint(fmt.qmin - low / scale), fmt.qmin, fmt.qmax)

    static = [params(w[i : i + size]) for i in range(0, k, size)]
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(k)
    out = np.zeros_like(w)
    current = (np.zeros(0), np.zeros(0))
    for step, i in enumerate(order):
        if act_order:
            current = static[i // size]
        elif i % size == 0:
            current = params(w[i : i + size])
        scale, zero = current
        out[i] = (np.clip(np.rint(w[i] / scale) + zero, fmt.qmin, fmt.qmax) - zero) * scale
        rest = order[step:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        w[rest[1:]] -= np.outer(inverse[1:, 0] / inverse[0, 0], w[i] - out[i])
    return out


def error(w: np.ndarray, approximation: np.ndarray, x: np.ndarray) -> float:
    """``|X W - X W_q|`` in float64."""
    return float(np.linalg.norm(x.astype(np.float64) @ (w - np.asarray(approximation, np.float64))))
