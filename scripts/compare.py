"""Compare weight and KV cache formats of one model: size, quality and speed.

Every combination of --formats and --kv-cache-dtypes is scored on the text, through the KV cache,
against the model as it was loaded. Results go to DIR/results.json, results.md and results.png
(matplotlib).

Examples:
  # the bundled model on a text of yours
  python scripts/compare.py --text book.txt --output-dir out

  # another model, chosen formats
  python scripts/compare.py --model path/to/llama --text valid.txt --output-dir out \\
      --formats bf16,fp8,int8,int4,w8a8_fp8 --kv-cache-dtypes bf16,fp8_e4m3,int8 --max-tokens 50000

  # bytes only, from config.json files, no weights needed
  python scripts/compare.py --memory-only --configs llama-8b/config.json,llama-70b/config.json \\
      --output-dir out

columns
  perplexity       exp of the mean negative log likelihood per token; lower is better
  kl               mean KL divergence from the unquantized model's predictions, in nats
  top1_agreement   how often greedy decoding would choose the same token
  weight_bytes     all weights, scales and unquantized embeddings included
  nominal_bytes    what is often quoted: parameters times bits, without either (--memory-only)
  *_tokens_per_s   over --batch-size sequences, as the serving engine runs them, without compiling

A KV cache type may carry a scale mode, as in int8:dynamic; tracked is the default, static needs
scales in the checkpoint or in --quantization-param-path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from qjax._device import end_process
from qjax.assets import bundled_model_path
from qjax.checkpoints.hf import LoadedModel, load_model, resolve_folder, stored_method
from qjax.checkpoints.kv_scale_files import read_kv_scale_file
from qjax.checkpoints.layout import head_rules
from qjax.evaluation import abstract_params, kv_bytes_per_token, score, weight_bytes, windows
from qjax.evaluation.heads import check_head_format, head_beside, label, with_head
from qjax.evaluation.memory import LINEAR_KERNELS, WeightBytes
from qjax.evaluation.report import Row, markdown_table, write_report
from qjax.evaluation.speed import measure_speed
from qjax.formats import QuantFormat, parse_format
from qjax.kv_format import parse_kv_format
from qjax.models.config import ModelConfig
from qjax.quantize import quantize_tree
from qjax.serving.key_bias import describe, leave_out_biases
from qjax.serving.settings import kv_formats
from qjax.training.bpe import read_text

BATCH_SIZE = 8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="model folder or hub id (default: the bundled model)")
    add("--text", help="UTF-8 text to score, .txt or .xz; needed unless --memory-only")
    add("--formats", default="bf16,fp8,int8,int4", help="weight formats (default %(default)s)")
    add(
        "--lm-head-format",
        default="none",
        metavar="FORMAT",
        help="weight format of the output projection with each of --formats but bf16, which keeps "
        "16 bits (default: none, 16 bits with all); a model that is quantized already is scored as "
        "it is and once more with this one",
    )
    add("--kv-cache-dtypes", default="bf16", help="KV cache types (default %(default)s)")
    add(
        "--quantization-param-path",
        metavar="FILE.json",
        help="static KV scales for KV cache types such as fp8_e4m3:static, as in serve.py",
    )
    add("--output-dir", required=True, help="where the results go")
    add("--max-tokens", type=int, help="score the beginning of the text only")
    add("--seq-len", type=int, help="tokens per sequence (default: the context, 2048 at most)")
    add("--batch-size", type=int, help=f"sequences together (default {BATCH_SIZE})")
    add("--separator", help="score the pieces of the text between these marks one by one")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the checkpoint's")
    add("--memory-only", action="store_true", help="sizes only, from the configuration")
    add("--configs", help="config.json files for --memory-only (default: that of --model)")
    add("--no-speed", action="store_true", help="leave the speed columns out")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> dict[str, QuantFormat | None]:
    """Errors first: everything that can be wrong without loading a model."""
    formats = {name: parse_format(name) for name in args.formats.split(",")}
    stored = args.model is not None and not args.memory_only  # it may be: its files will tell
    check_head_format(args.lm_head_format, formats.values(), stored=stored)
    for name in args.kv_cache_dtypes.split(","):
        parse_kv(name, jnp.bfloat16)
    for name in ("max_tokens", "seq_len", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < (2 if name == "seq_len" else 1):
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output-dir {args.output_dir} is a file; give a folder")
    for name in ("text", "max_tokens", "seq_len", "batch_size", "separator", "no_speed"):
        if args.memory_only and getattr(args, name) not in (None, False):
            flag = name.replace("_", "-")
            raise ValueError(f"--memory-only scores no text; leave --{flag} out")
    if not args.memory_only and not args.text:
        raise ValueError("--text is needed to score the formats, or --memory-only for sizes only")
    if args.quantization_param_path and ":static" not in args.kv_cache_dtypes:
        raise ValueError(
            f"--quantization-param-path {args.quantization_param_path}: no KV cache type uses it; "
            "add one such as fp8_e4m3:static to --kv-cache-dtypes"
        )
    if args.quantization_param_path and args.memory_only:
        raise ValueError("--memory-only needs no scales; leave --quantization-param-path out")
    if args.configs and args.model:
        raise ValueError(f"--configs and --model {args.model}: sizes are of one or the other")
    if args.configs and not args.memory_only:
        raise ValueError("--configs needs --memory-only: without weights nothing can be scored")
    args.batch_size = args.batch_size or BATCH_SIZE
    return formats


def parse_kv(name: str, dtype: Any) -> Any:
    base, _, mode = name.partition(":")
    return parse_kv_format(base, mode=mode or "tracked", model_dtype=dtype)


def size_columns(sizes: WeightBytes) -> Row:
    return {
        "weight_bytes": sizes.total,
        "scale_bytes": sizes.scales,
        "unquantized_bytes": sizes.plain,
        "bits_per_weight": sizes.bits_per_weight,
    }


def memory_rows(args: argparse.Namespace, formats: dict[str, QuantFormat | None]) -> list[Row]:
    sources = args.configs.split(",") if args.configs else [args.model or bundled_model_path()]
    configs = []
    for source in map(Path, sources):  # all are read before the first is computed
        named = source.parent.name if source.name == "config.json" else source.stem
        configs.append((named, ModelConfig.from_hf(source)))
        try:
            head_rules(configs[-1][1], parse_format(args.lm_head_format))
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from None
    rows = []
    for name, config in tqdm(configs, desc="models", disable=len(configs) < 2):
        dtype = jnp.dtype(args.dtype or config.dtype)
        for format_name, fmt in formats.items():
            head_name = head_beside(args.lm_head_format, fmt)
            head = parse_format(head_name or "none")
            sizes = weight_bytes(abstract_params(config, fmt, head=head, dtype=dtype))
            for kv in args.kv_cache_dtypes.split(","):
                per_token = kv_bytes_per_token(config, parse_kv(kv, dtype))
                bits = 8 * dtype.itemsize if fmt is None else fmt.bits
                rows.append(
                    {"model": name, "format": format_name, "lm_head_format": head_name}
                    | {"kv_cache_dtype": kv}
                    | {"nominal_bytes": sizes.elements * bits // 8}
                    | size_columns(sizes)
                    | {"kv_bytes_per_token": per_token}
                )
    return rows


def sequences(args: argparse.Namespace, loaded: LoadedModel, text: str, seq_len: int) -> list:
    tokenizer = loaded.require_tokenizer()
    pieces = [p.strip() for p in text.split(args.separator)] if args.separator else [text]
    result, left = [], args.max_tokens or float("inf")
    for piece in pieces:
        ids = jnp.asarray(tokenizer.encode(piece, add_special_tokens=False), jnp.int32)
        for window in windows(jax.device_get(ids), seq_len, loaded.config.bos_token_id):
            window = window[: int(min(len(window), left + 1))]
            if len(window) > 1:
                result.append(window)
                left -= len(window) - 1
    if not result:
        raise ValueError(f"--text {args.text!r} gives no token to score")
    return result


def scored_rows(args: argparse.Namespace, formats: dict[str, QuantFormat | None]) -> list[Row]:
    text = read_text(args.text)
    folder = resolve_folder(bundled_model_path() if args.model is None else args.model)
    scales, config = None, ModelConfig.from_hf(folder)
    head = head_rules(config, parse_format(args.lm_head_format))
    method = stored_method(folder)
    if method is not None and any(formats.values()):
        raise ValueError(
            f"{folder} is quantized already ({method}), so --formats can only be 'none', which "
            "scores it as it is"
        )
    check_head_format(args.lm_head_format, formats.values(), stored=method is not None)
    if args.quantization_param_path is not None:
        scales = read_kv_scale_file(args.quantization_param_path, config)
    loaded = load_model(folder, dtype=args.dtype)
    scales = loaded.kv_scales if scales is None else scales
    # With a checkpoint that is quantized already, lm_head is compared by itself.
    other = with_head(loaded.params, head) if head and method is not None else None
    dtype = loaded.module.dtype
    seq_len = args.seq_len or min(loaded.config.max_position_embeddings, 2048)
    data = sequences(args, loaded, text, seq_len)
    kv_names = args.kv_cache_dtypes.split(",")
    caches = {}
    for name in kv_names:
        base, _, mode = name.partition(":")
        caches[name] = kv_formats(base, mode or None, (), loaded.config.num_layers, dtype, scales)
    rows: list[Row] = []
    variants = [(name, fmt, head_beside(args.lm_head_format, fmt)) for name, fmt in formats.items()]
    if other is not None:
        variants.append((next(iter(formats)), None, args.lm_head_format))
    with tqdm(total=len(variants) * len(caches), desc="combinations") as bar:
        for name, fmt, head_name in variants:
            params = loaded.params
            if fmt is not None:
                params = quantize_tree(params, {LINEAR_KERNELS: fmt, **(head or {})})
            elif head_name is not None and other is not None:
                params = other
            for kv_name, (kv, static_scales) in caches.items():
                bar.set_postfix_str(f"{label(name, head_name)}, KV {kv_name}")
                # From these weights, as the serving engine decides it.
                kv, biases = leave_out_biases(kv, params, loaded.config, scales)
                if biases:
                    tqdm.write(f"KV {kv_name}: {describe(biases)}", file=sys.stderr)
                scores = score(
                    loaded.module,
                    params,
                    data,
                    kv_format=kv,
                    static_scales=static_scales,
                    reference=(loaded.module, loaded.params),
                    batch_size=args.batch_size,
                    progress="scoring",
                )
                row: Row = {"format": name, "kv_cache_dtype": kv_name}
                row["lm_head_format"] = head_name
                row |= size_columns(weight_bytes(params))
                row["kv_bytes_per_token"] = kv_bytes_per_token(loaded.config, kv)
                row |= {"perplexity": scores.perplexity, "kl": scores.kl}
                row |= {"top1_agreement": scores.top1_agreement, "tokens": scores.tokens}
                row["perplexity_change"] = (
                    scores.perplexity / rows[0]["perplexity"] - 1 if rows else None
                )
                if not args.no_speed:
                    new = min(64, seq_len // 2)
                    speed = measure_speed(
                        loaded.module,
                        params,
                        kv,
                        static_scales=static_scales,
                        batch_size=args.batch_size,
                        prompt_tokens=min(128, seq_len - new),
                        new_tokens=new,
                    )
                    row["prefill_tokens_per_s"] = speed.prefill_tokens_per_s
                    row["decode_tokens_per_s"] = speed.decode_tokens_per_s
                device = jax.devices()[0]
                row |= {"backend": jax.default_backend(), "device": device.device_kind}
                rows.append(row)
                write_report(rows, args.output_dir, title(args))  # what there is, if interrupted
                bar.update()
    return rows


def title(args: argparse.Namespace) -> str:
    if args.memory_only:
        return "Memory by format"
    return f"Formats of {Path(args.model or bundled_model_path()).name} on {Path(args.text).name}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    formats = check_args(args)
    rows = memory_rows(args, formats) if args.memory_only else scored_rows(args, formats)
    paths = write_report(rows, args.output_dir, title(args))
    print(markdown_table(rows))
    print("written: " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("compare.py: interrupted; finished rows are in --output-dir", file=sys.stderr)
        end_process(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
