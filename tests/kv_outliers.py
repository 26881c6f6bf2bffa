"""Perplexity with quantized KV caches where one late token is many times larger than the others.

``python -m tests.kv_outliers TEXT.txt --windows 192`` prints, for the bundled model, the change
from a bf16 cache to quantized ones. Such changes scatter: the standard error, from those of single
pieces of the text, says how far the mean may be off by chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax import evaluation
from qjax.assets import bundled_model_path
from qjax.checkpoints.hf import load_model
from qjax.kv_format import parse_kv_format
from qjax.ops import rotary

POSITION = 300
"""Of the token in its window: 300 come before it, some 200 after."""
_BATCH = 16


def append_with_outlier(
    append: Callable[..., Any], keys: float, values: float
) -> Callable[..., Any]:
    """``ops.kv.append`` with the keys and values of token ``POSITION`` times constants."""

    def with_outlier(
        cache: Any, layer: int, k: Any, v: Any, positions: Any, *rest: Any, **options: Any
    ) -> Any:
        late = (positions == POSITION)[:, :, None, None]
        k = jnp.where(late, k * jnp.float32(keys), k)
        v = jnp.where(late, v * jnp.float32(values), v)
        return append(cache, layer, k, v, positions, *rest, **options)

    return with_outlier


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="what the model has not been trained on")
    parser.add_argument("--windows", type=int, default=192, help="of 512 tokens (%(default)s)")
    parser.add_argument("--factor", type=float, default=50.0, help="of the token (%(default)s)")
    args = parser.parse_args()
    if args.windows < 2 * _BATCH:
        parser.error(f"--windows {args.windows}; a standard error needs {2 * _BATCH} or more")
    if not args.text.is_file():
        parser.error(f"{args.text}: no such file; give a text")
    loaded = load_model(bundled_model_path(), dtype=jnp.float32, progress=False)
    text = args.text.read_text(encoding="utf-8")[: 6 * 512 * (args.windows + 8)]
    ids = np.asarray(loaded.require_tokenizer().encode(text, add_special_tokens=False), np.int32)
    if ids.size < args.windows * 511:
        parser.error(f"{args.text} has {ids.size} tokens; {args.windows * 511} are needed")
    windows = evaluation.windows(ids[: args.windows * 511], 512, loaded.config.bos_token_id)
    append = rotary.append

    def log_perplexities(name: str, mode: str) -> np.ndarray:
        kv = parse_kv_format(name, mode=mode, model_dtype=jnp.float32)
        scores = (
            evaluation.score(
                loaded.module, loaded.params, windows[i : i + _BATCH], kv_format=kv, chunk=256
            )
            for i in range(0, len(windows), _BATCH)
        )
        return np.log([score.perplexity for score in scores])

    print("| larger | KV cache | scales | perplexity in bf16 | change, % | standard error, % |")
    print("|---|---|---|---:|---:|---:|")
    for label, keys, values in (
        ("nothing", 1.0, 1.0),
        ("values", 1.0, args.factor),
        ("keys", args.factor, 1.0),
    ):
        rotary.append = append_with_outlier(append, keys, values)
        plain = log_perplexities("bf16", "tracked")
        for name, mode in (("fp8_e4m3", "tracked"), ("fp8_e4m3", "dynamic"), ("int8", "tracked")):
            change = 100 * (log_perplexities(name, mode) - plain)
            error = change.std(ddof=1) / np.sqrt(change.size)
            print(
                f"| {label} | {name} | {mode} | {np.exp(plain.mean()):.2f} | "
                f"{change.mean():+.2f} | {error:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
