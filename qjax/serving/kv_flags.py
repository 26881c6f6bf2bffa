"""The flags of scripts/serve.py that concern the KV cache."""

from __future__ import annotations

import argparse

from qjax.serving.kv_scales import PLAIN_EXPORT_DTYPE

KV_TYPES = ("auto", "bf16", "fp8_e5m2", "fp8_e4m3", "int8", "int4")


def add_kv_flags(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument_group("KV cache").add_argument
    add(
        "--kv-cache-dtype",
        choices=KV_TYPES,
        help="type of keys and values (default: auto, what the checkpoint was calibrated for or "
        "else the compute type)",
    )
    add(
        "--kv-scale-mode",
        choices=("tracked", "dynamic", "static"),
        help="scales from a running absmax of the sequence, from each token alone, or calibrated "
        "ones of the checkpoint (default: static if it has them, else tracked)",
    )
    add(
        "--quantization-param-path",
        metavar="FILE.json",
        help="static scales from a file, in SGLang's layout or that of --export-kv-scales, instead "
        "of the checkpoint's; implies --kv-scale-mode static",
    )
    add(
        "--kv-skip-layers",
        metavar="LAYERS",
        default="",
        help="layers with an unquantized KV cache, such as 0,1,-1",
    )
    add(
        "--export-kv-scales",
        metavar="FILE.json",
        help="after the run, write static scales per layer and head that cover the largest keys "
        f"and values seen, for the run's KV cache type ({PLAIN_EXPORT_DTYPE} if that is 16-bit)",
    )
    add(
        "--kv-stats",
        action="store_true",
        help="after the run, print values that were clipped or rounded to 0 and the largest "
        "magnitudes, per layer (after an interruption: of the prompts that were left)",
    )
