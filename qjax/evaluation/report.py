"""Comparison tables: rows as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qjax._files import replacing, write_text_atomic
from qjax.evaluation.heads import label

Row = dict[str, Any]

# Column of a table: key, heading, how a value is printed.
_COLUMNS = (
    ("model", "model", "{}"),
    ("format", "weights", "{}"),
    ("lm_head_format", "lm_head", "{}"),
    ("kv_cache_dtype", "KV cache", "{}"),
    ("weight_bytes", "weights, MB", "{mega:,.2f}"),
    ("nominal_bytes", "bits times parameters, MB", "{mega:,.2f}"),
    ("bits_per_weight", "bits per weight", "{:.2f}"),
    ("scale_bytes", "of it scales, MB", "{mega:,.2f}"),
    ("unquantized_bytes", "of it unquantized, MB", "{mega:,.2f}"),
    ("kv_bytes_per_token", "KV bytes per token", "{:,}"),
    ("perplexity", "perplexity", "{:.4f}"),
    ("perplexity_change", "change", "{:+.2%}"),
    ("kl", "KL, nats", "{:.5f}"),
    ("top1_agreement", "top-1 agreement", "{:.2%}"),
    ("prefill_tokens_per_s", "prefill, tokens/s", "{:,.0f}"),
    ("decode_tokens_per_s", "decode, tokens/s", "{:,.0f}"),
)


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; columns that no row fills are left out."""
    columns = [c for c in _COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    lines = [
        "| " + " | ".join(heading for _, heading, _ in columns) + " |",
        "|" + "|".join("---" if form == "{}" else "---:" for _, _, form in columns) + "|",
    ]
    for row in rows:
        cells = [_cell(row.get(key), form) for key, _, form in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    if "mega" in form:
        return form.format(mega=value / 1e6)
    return form.format(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(rows: Sequence[Row], directory: str | Path, title: str) -> list[Path]:
    """Writes ``results.json``, ``results.md`` and, where matplotlib is installed, ``results.png``.

    Returns:
      The files written. In ``results.json`` a number that is not finite is null.
    """
    directory = Path(directory)
    paths = [directory / "results.json", directory / "results.md"]
    # JSON has no infinity, which is the perplexity of a model that a format destroyed.
    finite = [{key: _finite(value) for key, value in row.items()} for row in rows]
    write_text_atomic(paths[0], json.dumps(finite, indent=2, allow_nan=False) + "\n")
    write_text_atomic(paths[1], f"# {title}\n\n{markdown_table(rows)}")
    picture = directory / "results.png"
    if any(row.get("perplexity") is not None for row in rows) and _plot(rows, picture):
        paths.append(picture)
    return paths


def _plot(rows: Sequence[Row], path: Path) -> bool:
    """Perplexity over size, one mark per KV cache type; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, kv in enumerate(dict.fromkeys(row["kv_cache_dtype"] for row in rows)):
        chosen = [row for row in rows if row["kv_cache_dtype"] == kv]
        sizes = [row["weight_bytes"] / 1e6 for row in chosen]
        axes.plot(sizes, [r["perplexity"] for r in chosen], "os^vDP*X"[i % 8], label=f"KV {kv}")
        if i == 0:
            for row, size in zip(chosen, sizes, strict=True):
                axes.annotate(
                    label(row["format"], row.get("lm_head_format")),
                    (size, row["perplexity"]),
                    textcoords="offset points",
                    xytext=(6, 4),
                )
    axes.set_xlabel("weights (MB)")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return True
