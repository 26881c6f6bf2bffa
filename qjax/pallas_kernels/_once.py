"""Kernels that a program calls many times are lowered once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def lowered_once(*static: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a kernel's call a function of the module instead of a part of each caller.

    Mosaic takes tenths of a second to lower a kernel, and a decoder with unrolled layers calls each
    of a handful of kernels once per layer. Calls of an inner ``jit`` with equal shapes and static
    arguments share one lowering, and XLA inlines them. The interpreter is called as it is.

    Args:
      static: Names of the arguments that are not arrays.
    """

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        jitted = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return (function if kwargs.get("interpret") else jitted)(*args, **kwargs)

        return call

    return wrap
