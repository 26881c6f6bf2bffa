"""Generate text with quantized weights and KV cache: for prompts, or for clients over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from qjax import info
from qjax._device import end_process
from qjax.assets import bundled_model_path
from qjax.calibrate.cached import calibrated_folder, default_cache, parse_calibration
from qjax.checkpoints.hf import resolve_folder
from qjax.formats import FORMATS, parse_format
from qjax.models.config import ModelConfig
from qjax.serving import Engine
from qjax.serving.build import (
    ModelChoices,
    build_engine,
    check_model,
    engine_config,
    static_kv_dtype,
)
from qjax.serving.http_flags import (
    add_flags,
    check_flags,
    run_server,
    sampling_defaults,
    take_address,
)
from qjax.serving.kv_flags import add_kv_flags
from qjax.serving.kv_scales import (
    check_export,
    export_scales,
    kv_stats_lines,
    scales_fingerprint,
    scales_for_run,
)
from qjax.serving.offline import Job, prepare, run
from qjax.serving.printer import Printer, hang_up
from qjax.serving.prompts import gather_prompts
from qjax.serving.report import Summary
from qjax.serving.results import Result, ResultFile, checkpoint_fingerprint, fingerprint
from qjax.serving.settings import PRESETS, context_length, presets_help
from qjax.tokenizer import Tokenizer

DTYPES = ("auto", "bfloat16", "float16", "float32")

EPILOG = """\
presets (a flag of your own overrides its part of a preset)
{presets}

examples
  Continue two prompts with the bundled model, weights in INT4:
    python scripts/serve.py --quantization int4 --prompt "The old house" --prompt "At sea"
  A file of prompts, weights and KV cache in FP8, results in a file:
    python scripts/serve.py --model Qwen/Qwen3-8B --preset throughput \\
      --prompts prompts.jsonl --output results.jsonl --max-new-tokens 256
  GPTQ on your own text, kept for the next time:
    python scripts/serve.py --model DIR --quantization gptq --calibration-data text.txt \\
      --prompt "The old house"
  Sampled answers of a chat model, the MLP output projections unquantized:
    python scripts/serve.py --model DIR --chat --prompt "Why is the sky blue?" \\
      --quantization int8 --skip-layers '.*/down_proj/kernel' --temperature 0.7 --top-p 0.9
  A model that is too large for one GPU, over four:
    python scripts/serve.py --model DIR --quantization fp8 --tp-size 4 --prompts prompts.jsonl
  OpenAI's API on port 30000 (needs pip install 'qjax[server]'):
    python scripts/serve.py --model DIR --quantization fp8 --port 30000

prompt files
  .txt    one prompt per line; blank lines are skipped
  .jsonl  one object per line with "prompt" or "messages", and optionally max_new_tokens,
          temperature, top_p, top_k, seed, ignore_eos

output
  One JSON object per line in the order of the prompts: prompt, text, token_ids (with the
  end-of-sequence token if that was the end), prompt_tokens, finish_reason ("stop" or "length").
  Finished results are kept in OUTPUT.partial; after an interruption the same command goes on from
  there. Results do not depend on what else runs at the same time.

server
  With --port: POST /v1/completions and /v1/chat/completions, GET /v1/models, /health, /metrics.
  The sampling flags are then the defaults of requests; --max-model-len is 4096, or what the model
  was made for if that is less. Ctrl-C lets running requests end, for 10 seconds.

Compiling takes most of a short run's time. Set JAX_COMPILATION_CACHE_DIR to a folder, and the next
run with the same shapes skips it.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG.format(presets=presets_help()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        "--model-path",
        metavar="PATH",
        help="folder of a Hugging Face checkpoint, or a hub id such as Qwen/Qwen3-8B "
        "(default: the small model that comes with qjax)",
    )
    add("--preset", choices=PRESETS, help="weight and KV cache format for a purpose; see below")
    add(
        "--quantization",
        metavar="FORMAT",
        help=f"weight format (default: none): {', '.join(FORMATS)}; or a calibration method, alone "
        "or as METHOD:FORMAT, such as gptq, awq, autoround, gptq:int4_g32: an unquantized model is "
        "then calibrated before the first use",
    )
    add(
        "--calibration-data",
        type=Path,
        metavar="FILE",
        help="text to calibrate on, as of scripts/quantize.py (default: the model writes it)",
    )
    add(
        "--calibration-cache",
        type=Path,
        metavar="DIR",
        help=f"where calibrated models are kept (default: {default_cache()})",
    )
    add(
        "--skip-layers",
        metavar="REGEX",
        help="keep weights unquantized whose whole path matches, such as '.*/layers_0/.*'; "
        "lm_head always is, but for --lm-head-format",
    )
    add(
        "--lm-head-format",
        default="none",
        metavar="FORMAT",
        help="weight format of the output projection, which every token reads whole and which "
        "--quantization leaves in 16 bits: one of its formats (default: none). A calibration "
        "calibrates it too. A checkpoint that is quantized already can have one if its lm_head is "
        "stored in 16 bits; models with a tied embedding have none",
    )
    add("--dtype", choices=DTYPES, default="auto", help="compute type (default: the checkpoint's)")
    add(
        "--tp-size",
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="GPUs to cut every layer over: each holds about 1/N of weights and KV cache and reads "
        "its part for every token; they add up twice per layer. N must divide the KV heads and cut "
        "no quantization groups (default: 1, the first GPU)",
    )

    add_kv_flags(parser)
    add = parser.add_argument_group("prompts and results").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    add("--prompts", metavar="FILE", help="file of prompts, .txt or .jsonl; see below")
    add("--chat", action="store_true", help="send prompts as a user's message of the chat template")
    add("--output", metavar="FILE.jsonl", help="write results here instead of printing them")
    add("--overwrite", action="store_true", help="replace existing files of --output and the like")

    add = parser.add_argument_group("sampling").add_argument
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="per prompt (default: 64; of requests over HTTP 16, or for chats the whole context)",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="0 is greedy (default; 1 for requests over HTTP)",
    )
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus probability (default: 1)")
    add("--top-k", type=int, default=0, metavar="K", help="most likely tokens; 0 for all (default)")
    add(
        "--seed",
        type=int,
        metavar="S",
        help="prompt i uses S + i (default: 0; over HTTP, requests without a seed get one at "
        "random, and with S the same ones in order of arrival in every run)",
    )
    add("--ignore-eos", action="store_true", help="always generate max-new-tokens")

    add = parser.add_argument_group("capacity").add_argument
    add(
        "--max-running-requests",
        type=int,
        metavar="N",
        help="sequences that run at the same time (default: 8 on CPU, 32 on GPU)",
    )
    add(
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest prompt plus new tokens (default: what the prompts need, rounded up to a "
        "power of two)",
    )
    add(
        "--max-total-tokens",
        type=int,
        metavar="N",
        help="tokens in the whole KV cache; requests wait while their pages are not free "
        "(default: room for every running sequence at its longest)",
    )
    add("--page-size", type=int, default=64, metavar="N", help="tokens per page (default: 64)")
    add(
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        help="prompt tokens processed at once (default: 256 on CPU, 2048 on GPU)",
    )
    add(
        "--disable-radix-cache",
        action="store_true",
        help="do not share the KV cache pages of prompts that begin with the same tokens. Sharing "
        "changes no result; it saves memory page by page, and time in whole prefill chunks",
    )

    add_flags(parser)
    add = parser.add_argument_group("other").add_argument
    add("--info", action="store_true", help="print what this device runs natively, and exit")
    add("--quiet", action="store_true", help="no progress bar and no summary")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def generate(args: argparse.Namespace) -> None:
    """The whole job; everything that can be wrong with the input is found before weights load."""
    check_flags(args)
    preset = PRESETS[args.preset or "research"]
    args.quantization = args.quantization or preset.quantization
    calibration = parse_calibration(args.quantization)
    head_format = parse_format(args.lm_head_format)
    if calibration is None:
        parse_format(args.quantization)
        for name in ("data", "cache"):
            if getattr(args, f"calibration_{name}") is not None:
                raise ValueError(
                    f"--calibration-{name} has no use with --quantization {args.quantization}; it "
                    "goes with gptq, awq and the like"
                )
    args.kv_cache_dtype = args.kv_cache_dtype or preset.kv_cache_dtype
    choices = ModelChoices(
        **{f.name: getattr(args, f.name) for f in dataclasses.fields(ModelChoices)}
    )
    if args.output is not None and Path(args.output).suffix != ".jsonl":
        raise ValueError(f"--output {args.output}: results are JSON lines; name it .jsonl")
    if args.export_kv_scales is not None:
        check_export(
            args.export_kv_scales,
            overwrite=args.overwrite,
            kv_dtype=args.kv_cache_dtype,
            static=args.kv_scale_mode == "static" or args.quantization_param_path is not None,
        )
    prompts = gather_prompts(args.prompt, args.prompts) if args.port is None else []
    defaults = sampling_defaults(args)
    folder = resolve_folder(bundled_model_path() if args.model is None else args.model)
    model_config = ModelConfig.from_hf(folder)
    quantization = args.quantization if calibration is None else calibration[1]
    check_model(model_config, dataclasses.replace(choices, quantization=quantization))
    kv_scales = None
    if args.quantization_param_path is not None:
        kv_scales = scales_for_run(
            args.quantization_param_path,
            model_config,
            kv_dtype=choices.kv_cache_dtype,
            mode=choices.kv_scale_mode,
            skip_layers=choices.kv_skip_layers,
        )
        choices = dataclasses.replace(choices, kv_scale_mode="static")
    tokenizer = Tokenizer.from_folder(folder)
    jobs = prepare(prompts, tokenizer, defaults, chat=args.chat)
    config = engine_config(
        context_length(model_config, jobs, args.max_model_len),
        args.page_size,
        max_running_requests=args.max_running_requests,
        max_total_tokens=args.max_total_tokens,
        chunked_prefill_size=args.chunked_prefill_size,
        prefix_cache=not args.disable_radix_cache,
        kv_counters=True if args.kv_stats or args.export_kv_scales else None,
    )
    bound = None if args.port is None else take_address(args)
    model = args.model or folder.name
    if calibration is not None:
        folder = calibrated_folder(
            folder,
            args.quantization,
            text=args.calibration_data,
            skip=choices.skip_layers,
            head=head_format,
            kv_dtype=static_kv_dtype(choices, kv_scales),
            cache=args.calibration_cache,
            say=lambda line: note(args, line),
            progress=not args.quiet,
        )
        as_stored: dict[str, Any] = {"quantization": "none", "lm_head_format": "none"}
        choices = dataclasses.replace(choices, **as_stored, skip_layers=None)

    streaming = args.output is None and len(jobs) == 1

    def build() -> tuple[Engine, str, str]:
        return build_engine(
            folder,
            choices,
            config,
            kv_scales=kv_scales,
            progress=not args.quiet,
            # Not into a line of text that is being streamed.
            on_compile=None if streaming else lambda name: note(args, f"compiling {name}"),
            on_note=lambda line: note(args, line),
        )

    if bound is not None:
        engine, *formats = build()
        run_server(args, bound, engine, tokenizer, model=model, say=lambda line: note(args, line))
        summarize(args, engine, *formats)
        export(args, engine)
        return
    if args.output is None:
        printer = Printer(len(jobs), streaming)
        engine, *formats = build()
        if streaming:
            note(args, "compiling while the text begins")
        printer.start(jobs[0].text)
        try:
            run_jobs(args, engine, tokenizer, list(enumerate(jobs)), printer.add, printer.text)
        except KeyboardInterrupt:
            printer.rest()
            raise Interrupted("interrupted; finished results are printed above") from None
        summarize(args, engine, *formats)
        export(args, engine)
        return
    settings = {
        "model": str(folder.resolve()),
        "checkpoint": checkpoint_fingerprint(folder),
        "prompts": fingerprint([[j.request.prompt, vars(j.request.params)] for j in jobs]),
        "max_model_len": config.max_model_len,
        **dataclasses.asdict(choices),
        "kv_scales": scales_fingerprint(kv_scales),
    }
    engine = None
    with ResultFile(args.output, len(jobs), settings, overwrite=args.overwrite) as file:
        todo = [(i, job) for i, job in enumerate(jobs) if i not in file.done]
        if file.done:
            if args.export_kv_scales is not None:
                raise ValueError(
                    f"{len(file.done)} of {len(jobs)} results are in {file.partial}, so only the "
                    "other prompts would be measured; delete it, or leave out --export-kv-scales"
                )
            note(args, f"{len(file.done)} of {len(jobs)} results found in {file.partial}")
        try:
            if todo:
                engine, *formats = build()
                run_jobs(args, engine, tokenizer, todo, file.add, None)
                summarize(args, engine, *formats)
            file.finish()
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; {len(file.done)} of {len(jobs)} results are in {file.partial}; "
                + ("without --export-kv-scales, " if args.export_kv_scales is not None else "")
                + "the same command goes on from there"
            ) from None
    note(args, f"{len(jobs)} results in {args.output}")
    if engine is not None:
        export(args, engine)
    elif args.kv_stats:
        note(args, "no KV cache statistics: every result was there already")


def summarize(args: argparse.Namespace, engine: Engine, weights: str, kv_cache: str) -> None:
    """Speed, memory and, if wanted, KV cache statistics."""
    for line in Summary.of(engine).lines(weights, kv_cache):
        note(args, line)
    if args.kv_stats:  # asked for, so printed in spite of --quiet
        tokens = engine.stats.prefill_tokens + engine.stats.decode_tokens
        for line in kv_stats_lines(engine.cache, tokens):
            tqdm.write(line, file=sys.stderr)


def export(args: argparse.Namespace, engine: Engine) -> None:
    """Measured scales into a file, after the results are safe."""
    if args.export_kv_scales is not None:
        dtype = export_scales(args.export_kv_scales, engine.cache, engine.module.config)
        note(args, f"KV cache scales for {dtype} in {args.export_kv_scales}")


def run_jobs(
    args: argparse.Namespace,
    engine: Engine,
    tokenizer: Tokenizer,
    jobs: Sequence[tuple[int, Job]],
    on_result: Any,
    on_piece: Any,
) -> None:
    """Run jobs under a progress bar."""
    # A single prompt is streamed, which shows its own progress.
    disabled = args.quiet or (on_piece is not None and len(jobs) == 1)
    tokens = 0
    bar_settings: dict[str, Any] = {"unit": "prompt", "disable": disabled, "miniters": 0}
    with tqdm(total=len(jobs), desc="generating", **bar_settings) as bar:

        def result(index: int, result: Result) -> None:
            on_result(index, result)
            bar.update()

        def text(index: int, piece: str, count: int) -> None:
            nonlocal tokens
            tokens += count
            bar.set_postfix(tokens=tokens, refresh=False)
            bar.update(0)  # redraws, at most ten times a second
            if on_piece is not None:
                on_piece(piece)

        run(engine, tokenizer, jobs, on_result=result, on_text=text)


class Interrupted(Exception):
    """Ctrl-C, with what became of the results."""


def note(args: argparse.Namespace, line: str) -> None:
    """A line for the user, apart from the results on standard output."""
    if not args.quiet:
        tqdm.write(line, file=sys.stderr)  # does not break a progress bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code: 0, 2 for an error, 130 after Ctrl-C, 141 if nobody reads."""
    args = build_parser().parse_args(argv)
    if args.info:
        return info.main()
    try:
        generate(args)
    except (Interrupted, KeyboardInterrupt) as error:
        said = str(error) or "interrupted before anything was generated"
        print(f"serve.py: {said}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return hang_up()
    except OSError as error:
        return fail(args, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        return fail(args, str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cause = str(error).splitlines()[0][:200]
        hint = "lower --max-running-requests, --max-model-len or --max-total-tokens, or quantize"
        return fail(args, f"the device's memory is too small; {hint} ({cause})")
    return 0


def fail(args: argparse.Namespace, message: str) -> int:
    """Print an error in one line; returns the exit code."""
    if args.debug:
        raise  # noqa: PLE0704 - called from an except block
    print(f"serve.py: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    end_process(main())
