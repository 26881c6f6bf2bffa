"""An engine's figures in the text format of Prometheus."""

from __future__ import annotations

from qjax.serving.worker import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def prometheus_text(load: Load, now: float) -> str:
    """All metrics.

    Args:
      load: The engine's figures.
      now: ``time.monotonic()``.
    """
    stats = load.stats
    started = stats.prefill_tokens + stats.reused_tokens
    rows: list[tuple[str, str, str, float]] = [
        ("requests_running", "gauge", "Requests that have a slot.", load.running),
        ("requests_waiting", "gauge", "Requests that wait for a slot or for pages.", load.waiting),
        ("kv_pages_used", "gauge", "KV cache pages that requests hold.", load.pages_used),
        ("kv_pages", "gauge", "KV cache pages.", load.pages_total),
        (
            "generated_tokens_per_second",
            "gauge",
            "New tokens of all requests over the last 10 seconds.",
            load.tokens_per_second(now),
        ),
        ("prompt_tokens_total", "counter", "Prompt tokens of requests.", started),
        (
            "reused_prompt_tokens_total",
            "counter",
            "Of these the ones that the KV cache had already.",
            stats.reused_tokens,
        ),
        ("generated_tokens_total", "counter", "New tokens.", load.generated),
        ("compile_seconds_total", "counter", "Time spent compiling.", stats.compile_seconds),
    ]
    lines = []
    for name, kind, text, value in rows:
        lines += [f"# HELP qjax_{name} {text}", f"# TYPE qjax_{name} {kind}"]
        lines.append(f"qjax_{name} {value:.10g}")
    lines.append(
        "# HELP qjax_requests_total Requests that ended, by how (cancelled: at a stop string too)."
    )
    lines.append("# TYPE qjax_requests_total counter")
    for reason in ("stop", "length", "cancelled", "error"):
        lines.append(f'qjax_requests_total{{reason="{reason}"}} {load.ended.get(reason, 0)}')
    return "\n".join(lines) + "\n"
