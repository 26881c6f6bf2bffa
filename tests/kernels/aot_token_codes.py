"""Compile the kernels that give codes of activations for sm_90a without a GPU; see ``aot``.

``python -m tests.kernels.aot_token_codes < cases.json`` prints one JSON line per case.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from tests.kernels.aot import Report, compile_program, target_sharding


def compile_case(case: dict[str, Any], sharding: Any) -> Report:
    """Compile one kernel.

    Args:
      case: ``rows``, ``columns``, ``kind`` (of codes, or None), ``blocks``, and either ``gated`` or
        ``splits`` (of what is added before the normalisation) and ``weight`` (its type); perhaps
        ``normed``, the type of the normalised rows.
      sharding: Where arrays lie.
    """
    import jax
    import jax.numpy as jnp

    from qjax.pallas_kernels import add_rms_norm, token_codes

    rows, columns, kind, blocks = (case[name] for name in ("rows", "columns", "kind", "blocks"))

    def array(shape: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    if "splits" not in case:
        wide = columns * (2 if case["gated"] else 1)
        return compile_program(
            lambda x: token_codes.token_codes(x, kind=kind, blocks=blocks, gated=case["gated"]),
            array((rows, wide), "bfloat16"),
        )
    splits = case["splits"]
    return compile_program(
        lambda x, delta, weight: add_rms_norm.add_rms_norm(
            x, delta, weight, 1e-5, codes=kind, blocks=blocks, normed_dtype=case.get("normed")
        ),
        array((rows, columns), "bfloat16"),
        array((splits, rows, columns), "float32" if splits > 1 else "bfloat16"),
        array((columns,), case["weight"]),
    )


def main() -> None:
    """Read a JSON list of cases from standard input; write a report for each."""
    sharding = target_sharding()
    for case in json.load(sys.stdin):
        print(json.dumps(dataclasses.asdict(compile_case(case, sharding))), flush=True)


if __name__ == "__main__":
    main()
