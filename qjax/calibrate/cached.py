"""Calibrate once, serve often: calibrated checkpoints in a cache folder of the user.

A name such as ``gptq`` or ``awq:int4_g32`` stands for a method and a format. The result lies in a
folder whose name holds a hash of everything that decides it, so it is found again by any program.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qjax._files import sole_run
from qjax.calibrate.run import calibrate_checkpoint
from qjax.calibrate.settings import METHODS, Settings
from qjax.calibrate.source import ModelSource
from qjax.calibrate.store import fingerprint as array_fingerprint
from qjax.calibrate.text import read_documents, sample_tokens
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.layout import head_rules
from qjax.formats import QuantFormat, parse_format
from qjax.kv_format import parse_kv_format
from qjax.sampling import SamplingParams
from qjax.serving.engine import Engine, EngineConfig
from qjax.serving.results import checkpoint_fingerprint, fingerprint
from qjax.serving.scheduler import Request
from qjax.tokenizer import Tokenizer

Samples = tuple[np.ndarray, np.ndarray]
SAMPLES = 128
"""Sequences of calibration text."""
MAX_LENGTH = 2048
"""Longest sequence from a file."""
_OWN_SAMPLES, _OWN_LENGTH = 64, 256
_BATCH_TOKENS = 8192
_REVISION = 1
"""To be raised when the same input gives another result."""


def parse_calibration(name: str | None) -> tuple[str, str] | None:
    """Method and format of a name, or None if it does not begin with a calibration method.

    Args:
      name: Such as ``gptq``, ``smoothquant`` or ``awq:int4_g32_asym``; ``rtn`` is no calibration.
    """
    method, _, fmt = (name or "").partition(":")
    if method not in METHODS or method == "rtn":
        return None
    return method, fmt or ("w8a8_int8" if method.startswith("smoothquant") else "int4")


def default_cache() -> Path:
    """``~/.cache/qjax/calibrated``, or under ``XDG_CACHE_HOME``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "qjax" / "calibrated"


def calibrated_folder(
    source: Path,
    name: str,
    *,
    text: Path | None = None,
    skip: str | None = None,
    head: QuantFormat | None = None,
    kv_dtype: str | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> Path:
    """The folder of a calibrated checkpoint; made now unless it is there already.

    Args:
      source: Folder of an unquantized checkpoint.
      name: See ``parse_calibration``.
      text: Calibration text; None lets the model write it.
      skip: Regular expression on parameter paths to leave unquantized.
      head: Format of ``lm_head``, calibrated like the others; None leaves it unquantized.
      kv_dtype: Also calibrate static KV cache scales for this type.
      cache: Where calibrated checkpoints are; ``default_cache()`` if None.
      say: Is told in a line what is being done, what was found, or which process is waited for
        because it is making the same.
      progress: Show progress bars.

    Raises:
      ValueError: If the name, the text or the model cannot be used.
    """
    parsed = parse_calibration(name)
    if parsed is None:
        raise ValueError(f"{name!r} is no calibration; choose METHOD or METHOD:FORMAT")
    method, format_name = parsed
    config = ModelSource(source).config  # refuses what is quantized already
    rules = () if skip is None else ((skip, None),)
    rules += tuple((head_rules(config, head) or {}).items())
    settings = Settings(parse_format(format_name), method, rules=rules, kv_dtype=kv_dtype)
    tokenizer = Tokenizer.from_folder(source)
    samples = None
    if text is not None:
        samples = sample_tokens(
            read_documents(text),
            tokenizer.encode,
            num_samples=SAMPLES,
            seq_len=min(MAX_LENGTH, config.max_position_embeddings),
            bos_id=tokenizer.bos_id,
        )
    files = [path.stat().st_mtime_ns for path in sorted(source.glob("*.safetensors"))]
    key = fingerprint(
        [
            str(source.resolve()),
            checkpoint_fingerprint(source),
            files,  # sizes alone do not tell two fine-tunes apart
            settings.to_json(),
            "own text" if samples is None else array_fingerprint(*samples),
            _REVISION,
        ]
    )
    cache = default_cache() if cache is None else cache
    target = cache / f"{source.resolve().name}-{name.replace(':', '-')}-{key}"
    if not target.is_dir():
        with sole_run(target.with_name(f".{target.name}.lock"), target, waiting=say):
            if not target.is_dir():  # another process may have made it while this one waited
                origin = "text the model writes itself" if text is None else str(text)
                say(
                    f"calibrating {source.name} with {method} for {format_name}, on {origin}; the "
                    f"result is kept in {target}"
                )
                if samples is None:
                    samples = own_text(source, tokenizer.bos_id)
                calibrate_checkpoint(
                    source,
                    target,
                    settings,
                    samples,
                    batch_tokens=_BATCH_TOKENS,
                    progress=progress,
                )
                return target
    say(f"using {target}, calibrated before")
    return target


def own_text(source: Path, bos_id: int | None) -> Samples:
    """Sequences sampled from the model itself, each begun with a token by chance.

    Args:
      source: Folder of the checkpoint.
      bos_id: Begin-of-sequence token, or None.

    Returns:
      ``(tokens, valid)``.

    References:
      Liu et al., LLM-QAT, arXiv:2305.17888.
    """
    model = load_model(source, progress=False)
    length = min(_OWN_LENGTH, model.config.max_position_embeddings)
    plain = parse_kv_format("auto", model_dtype=model.module.dtype)
    config = EngineConfig(max_running_requests=16, max_model_len=length, page_size=16)
    engine = Engine(model.module, model.params, config, plain)
    head = () if bos_id is None else (bos_id,)
    first = np.random.default_rng(0).integers(0, model.config.vocab_size, _OWN_SAMPLES)
    requests = [
        Request(
            (*head, int(token)),
            SamplingParams(
                temperature=1.0, seed=i, max_new_tokens=length - len(head) - 1, ignore_eos=True
            ),
        )
        for i, token in enumerate(first)
    ]
    start = engine.next_id
    tokens = np.zeros((_OWN_SAMPLES, length), np.int32)
    for done in engine.generate(requests):
        row = done.request_id - start
        tokens[row] = [*requests[row].prompt, *done.token_ids]
    return tokens, np.ones(tokens.shape, bool)
