"""Reading the keys of a config.json so that none is overlooked."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# Keys that do not change what the network computes at inference: bookkeeping of transformers,
# training and generation defaults, and what quantized checkpoints add (their readers look there).
# Generation defaults come from generation_config.json and the request.
_HARMLESS = frozenset(
    """
    attention_dropout auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    compression_config cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout id2label initializer_range is_decoder label2id length_penalty max_length
    min_length model_max_length no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix pretraining_tp problem_type quantization_config remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torchscript transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_mm_proj
    """.split()
)

# Harmless with exactly these values; others change the computation.
_HARMLESS_IF = {
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "residual_dropout": (0, 0.0, None),
    "rope_interleaved": (False, None),
    "use_qk_norm": (False, None),
}


class Keys:
    """The keys of one config.json, each to be taken once; what is left over must be harmless."""

    def __init__(self, values: Mapping[str, Any], name: str, ignore: Collection[str] = ()):
        self._values = dict(values)
        self._name = name
        absent = sorted(set(ignore) - set(values))
        if absent:
            raise ValueError(f"{name}: ignore_keys names {absent[0]!r}, which is not in it")
        self._ignore = frozenset(ignore)

    def error(self, key: str, value: Any, why: str) -> ValueError:
        """The error to raise about a key."""
        return ValueError(f"{self._name}: {key}={value!r} is not supported: {why}")

    def take(self, key: str, default: Any) -> Any:
        """Remove a key and return its value, or the default if it is absent."""
        return self._values.pop(key, default)

    def size(self, key: str) -> int:
        """Take a key that must be a positive integer."""
        value = self.take(key, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, value, "a positive integer is needed")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """Take a key that must be true, false or null (the default)."""
        value = self.take(key, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false is needed")
        return value

    def refuse_rest(self) -> None:
        """Raise for the first key that was not taken and is not known to be harmless.

        Null means "not used", and a leading underscore marks bookkeeping of transformers.
        """
        for key, value in self._values.items():
            if key in _HARMLESS or key in self._ignore or key.startswith("_") or value is None:
                continue
            if key in _HARMLESS_IF and value in _HARMLESS_IF[key]:
                continue
            raise self.error(
                key,
                value,
                f"this key is not known; if it does not change the computation, "
                f"pass ignore_keys=({key!r},)",
            )


def read_config_json(path: str | Path) -> dict[str, Any]:
    """Read a config.json, given as a file or as its folder.

    Raises:
      ValueError: If it is missing or no JSON object.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}); download it again") from e
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(values).__name__}")
    return values
