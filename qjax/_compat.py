"""The only module that looks at a jax version or at private jax names."""

from __future__ import annotations

import jax

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3])

MOSAIC_GPU_MIN_JAX = (0, 11, 2)
"""Pallas Mosaic GPU kernels are written for this jax and later; the XLA backend runs on 0.10.2."""
