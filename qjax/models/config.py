"""Model configuration, read from the ``config.json`` of Hugging Face checkpoints.

A key which this file does not know, or a value which asks for a computation that is not
implemented, is an error with its name: a model that loads is the model that was trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qjax.models._hf_config import Keys, read_config_json
from qjax.nn.rotary import RopeScaling

# model_type -> the class name in "architectures".
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything static about a decoder. Hashable; a static argument of jitted functions.

    Attributes:
      vocab_size: Rows of the embedding.
      hidden_size: Width of the residual stream.
      intermediate_size: Width of the MLP.
      num_layers: Decoder layers.
      num_q_heads: Query heads.
      num_kv_heads: Key/value heads; divides ``num_q_heads``.
      head_dim: Features per head, even.
      max_position_embeddings: Longest context the model was made for.
      rope_theta: Base of the rotary wavelengths.
      rope_scaling: Context extension, or None.
      rms_norm_eps: Epsilon of every RMS norm.
      tie_word_embeddings: The embedding is also the output projection; no ``lm_head``.
      attention_bias: Biases on q, k and v.
      attention_out_bias: Bias on the attention's output projection.
      mlp_bias: Biases in the MLP.
      qk_norm: RMS norm on every query and key head.
      layer_windows: Sliding window of each layer in tokens, None for full attention. Filled with
        None when left empty.
      bos_token_id: Begin-of-sequence id, or None.
      eos_token_ids: Ids that end a sequence; may be empty.
      model_type: Family: a key of ``ARCHITECTURES``.
      dtype: Name of the dtype the checkpoint was saved in.

    Raises:
      ValueError: If sizes do not fit together; the message prints them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    model_type: str = "llama"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"{field.name}={value} must be positive")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embedding")
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(
                f"layer_windows has {len(self.layer_windows)} entries for "
                f"num_layers={self.num_layers}"
            )
        if any(w is not None and w < 1 for w in self.layer_windows):
            raise ValueError(f"layer_windows={self.layer_windows} must be positive or None")
        if self.model_type not in ARCHITECTURES:
            raise ValueError(
                f"model_type={self.model_type!r} is not implemented; implemented are "
                f"{', '.join(ARCHITECTURES)}"
            )

    @classmethod
    def from_hf(
        cls, source: Mapping[str, Any] | str | Path, *, ignore_keys: Collection[str] = ()
    ) -> ModelConfig:
        """Read a Hugging Face configuration.

        Args:
          source: The parsed ``config.json``, its path, or the folder it lies in.
          ignore_keys: Keys which the caller knows not to change the computation. Needed only
            where a checkpoint carries keys that are unknown here.

        Returns:
          The configuration. Missing optional keys take the value Hugging Face gives them.

        Raises:
          ValueError: If the architecture, a key or a value is not implemented; names it.
        """
        name = "config.json" if isinstance(source, Mapping) else str(source)
        values = source if isinstance(source, Mapping) else read_config_json(source)
        return from_keys(cls, Keys(values, name, ignore_keys))

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` which ``from_hf`` and Hugging Face read back as this configuration.

        Raises:
          ValueError: If layers have different sliding windows, which that file cannot express.
        """
        eos: int | list[int] | None = list(self.eos_token_ids) or None
        if len(self.eos_token_ids) == 1:
            eos = self.eos_token_ids[0]
        out: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": self.model_type,
            "num_attention_heads": self.num_q_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": _rope_to_hf(self.rope_scaling),
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "vocab_size": self.vocab_size,
        }
        if self.model_type in ("llama", "qwen3"):
            out["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        windows = sorted({w for w in self.layer_windows if w is not None})
        if len(windows) > 1:
            raise ValueError(f"layer_windows={self.layer_windows}: config.json holds one window")
        if self.model_type != "llama":
            out["sliding_window"] = windows[0] if windows else None
        if self.model_type.startswith("qwen"):
            out["use_sliding_window"] = bool(windows)
            out["layer_types"] = [
                "full_attention" if w is None else "sliding_attention" for w in self.layer_windows
            ]
        return out


def from_keys(cls: type[ModelConfig], keys: Keys) -> ModelConfig:
    """Build a configuration out of a config.json whose keys are counted as they are read."""
    family = _model_type(keys)
    act = keys.take("hidden_act", "silu")
    if act != "silu":
        raise keys.error("hidden_act", act, "only 'silu' is implemented")
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    layers = keys.size("num_hidden_layers")
    kv_heads = keys.take("num_key_value_heads", None)
    if kv_heads is None and family != "llama":
        raise keys.error("num_key_value_heads", None, f"{family} models need it")
    # Qwen3's default is a constant, the others divide.
    head_dim = keys.take("head_dim", None) or (128 if family == "qwen3" else None)
    if head_dim is None and hidden % heads:
        raise keys.error("head_dim", None, f"hidden_size={hidden} is no multiple of {heads} heads")
    max_positions = keys.size("max_position_embeddings")
    rope_theta, rope_scaling = _rope(keys, max_positions)
    # Qwen2 has biases on q, k, v by definition; where others have the key it means q, k, v and o.
    bias = keys.flag("attention_bias", default=family == "qwen2")
    if bias != (family == "qwen2") and family not in ("llama", "qwen3"):
        raise keys.error("attention_bias", bias, f"{family} models are defined without this choice")
    mlp_bias = keys.flag("mlp_bias", default=False)
    if mlp_bias and family != "llama":
        raise keys.error("mlp_bias", mlp_bias, f"{family} models have none")
    partial = keys.take("partial_rotary_factor", 1.0)
    if partial not in (None, 1, 1.0):
        raise keys.error("partial_rotary_factor", partial, "only 1.0 is implemented")
    eos = keys.take("eos_token_id", None)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    dtype = keys.take("dtype", None)
    torch_dtype = keys.take("torch_dtype", None)
    config = cls(
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.size("intermediate_size"),
        num_layers=layers,
        num_q_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        max_position_embeddings=max_positions,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=float(keys.take("rms_norm_eps", 1e-6)),
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=False),
        attention_bias=bias,
        attention_out_bias=bias and family != "qwen2",
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        layer_windows=_windows(keys, family, layers),
        bos_token_id=keys.take("bos_token_id", None),
        eos_token_ids=eos_ids,
        model_type=family,
        dtype=str(dtype or torch_dtype or "bfloat16").removeprefix("torch."),
    )
    keys.refuse_rest()
    return config


def _model_type(keys: Keys) -> str:
    names = keys.take("architectures", None)
    family = keys.take("model_type", None)
    by_class = {v: k for k, v in ARCHITECTURES.items()}
    known = ", ".join(by_class)
    if names is not None:
        if len(names) != 1 or names[0] not in by_class:
            raise keys.error("architectures", names, f"implemented are {known}")
        if family is not None and family != by_class[names[0]]:
            raise keys.error("model_type", family, f"it does not go with architectures={names}")
        return by_class[names[0]]
    if family not in ARCHITECTURES:
        raise keys.error("model_type", family, f"implemented are {', '.join(ARCHITECTURES)}")
    return family


def _windows(keys: Keys, family: str, layers: int) -> tuple[int | None, ...]:
    # Mistral's class default is 4096, so a file without the key means that.
    window = keys.take("sliding_window", 4096 if family in ("mistral", "qwen2", "qwen3") else None)
    use = keys.flag("use_sliding_window", default=family in ("llama", "mistral"))
    first_sliding = keys.take("max_window_layers", 28 if family.startswith("qwen") else 0)
    types = keys.take("layer_types", None)
    if not use:
        window = None
    if window is not None and family == "llama":
        raise keys.error("sliding_window", window, "llama models have full attention")
    if types is None:
        sliding = [window is not None and i >= first_sliding for i in range(layers)]
    else:
        if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
            raise keys.error(
                "layer_types",
                types,
                f"needs {layers} entries of 'full_attention' or 'sliding_attention'",
            )
        sliding = [t == "sliding_attention" for t in types]
        if any(sliding) and window is None:
            raise keys.error("sliding_window", window, "layer_types names sliding layers")
        if family == "mistral" and not all(s == (window is not None) for s in sliding):
            raise keys.error("layer_types", types, "mistral models have one kind of layer")
    return tuple(window if s else None for s in sliding)


_ROPE_KEYS = {
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    },
}


def _rope(keys: Keys, max_positions: int) -> tuple[float, RopeScaling | None]:
    theta = keys.take("rope_theta", None)
    old, new = keys.take("rope_scaling", None), keys.take("rope_parameters", None)
    key, values = ("rope_parameters", new) if new is not None else ("rope_scaling", old)
    if old is not None and new is not None and old != new:
        raise keys.error("rope_scaling", old, f"it contradicts rope_parameters={new}")
    rope = dict(values or {})
    inner_theta = rope.pop("rope_theta", None)
    if theta is not None and inner_theta is not None and theta != inner_theta:
        raise keys.error("rope_theta", theta, f"it contradicts {key}={values}")
    theta = theta if theta is not None else inner_theta
    theta = 10000.0 if theta is None else float(theta)
    # Both spellings of the type occur, at times in the same file.
    kinds = {k for k in (rope.pop("rope_type", None), rope.pop("type", None)) if k is not None}
    kind = kinds.pop() if kinds else ("default" if not rope else None)
    partial = rope.pop("partial_rotary_factor", None)
    if partial not in (None, 1, 1.0):
        raise keys.error(f"{key}.partial_rotary_factor", partial, "only 1.0 is implemented")
    if kinds or kind not in ("default", *_ROPE_KEYS):
        known = ", ".join(("default", *_ROPE_KEYS))
        raise keys.error(key, values, f"the rope types implemented are {known}")
    rope = {k: v for k, v in rope.items() if v is not None}
    unknown = sorted(set(rope) - _ROPE_KEYS.get(kind, set()))
    if unknown:
        raise keys.error(f"{key}.{unknown[0]}", rope[unknown[0]], f"not known for {kind!r}")
    if kind == "default":
        return theta, None
    if "factor" not in rope:
        raise keys.error(key, values, "it needs a factor")
    if kind != "linear":
        rope.setdefault("original_max_position_embeddings", max_positions)
    if kind == "yarn":
        rope.setdefault("attention_factor", _yarn_attention_factor(rope["factor"]))
    try:
        return theta, RopeScaling(rope_type=kind, **rope)
    except ValueError as e:
        raise keys.error(key, values, str(e)) from e


def _yarn_attention_factor(factor: float) -> float:
    # The paper's fit: how much sharper attention must be over a longer context.
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    kind = values.pop("rope_type")
    return {"rope_type": kind} | {k: v for k, v in values.items() if k in _ROPE_KEYS[kind]}
