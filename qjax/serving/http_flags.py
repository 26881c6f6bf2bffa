"""The flags of scripts/serve.py that concern serving over HTTP, and the server they start."""

from __future__ import annotations

import argparse
import random
import socket
from collections.abc import Callable

from qjax.sampling import SamplingParams
from qjax.serving.engine import Engine
from qjax.tokenizer import Tokenizer

HOST = "127.0.0.1"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument_group("HTTP server").add_argument
    add("--port", type=int, metavar="PORT", help="serve here (0: any free port); see below")
    add("--host", metavar="ADDRESS", help="address to serve at (default: 127.0.0.1)")
    add("--served-model-name", metavar="NAME", help="name in the API (default: the model's path)")
    add("--api-key", metavar="KEY", help="what clients must send as bearer token (default: none)")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect.

    Raises:
      ValueError: If a flag goes with ``--port`` only and there is none, or the other way round; or
        if there is no file to overwrite.
    """
    if args.port is None:
        only, why = ("host", "served_model_name", "api_key"), "has no use without --port"
    else:
        only = ("prompt", "prompts", "chat", "output")
        why = "has no use with --port: prompts come and go over HTTP"
    for name in only:
        if getattr(args, name) not in (None, False, []):
            raise ValueError(f"--{name.replace('_', '-')} {why}; leave it out")
    if args.overwrite and args.output is None and args.export_kv_scales is None:
        raise ValueError(
            "--overwrite has no use without --output or --export-kv-scales: no file is written"
        )
    if args.api_key == "":
        raise ValueError("--api-key is empty; give a key, or leave it out to let everyone in")


def sampling_defaults(args: argparse.Namespace) -> SamplingParams:
    """Sampling of prompts that bring no settings of their own.

    Raises:
      ValueError: If a value is out of range.
    """
    given = {
        "max_new_tokens": 64,
        "temperature": 0.0 if args.port is None else 1.0,
        "seed": 0,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "ignore_eos": args.ignore_eos,
    }
    for name in ("max_new_tokens", "temperature", "seed"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    return SamplingParams(**given)


def take_address(args: argparse.Namespace) -> socket.socket:
    """Look for what the server needs, and take its address, before weights load.

    Raises:
      ValueError: If a package is missing or the address cannot be had.
    """
    try:
        from qjax.serving.http_app import bind
    except ImportError as error:
        raise ValueError(str(error)) from None
    return bind(args.host or HOST, args.port)


def run_server(
    args: argparse.Namespace,
    bound: socket.socket,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    model: str,
    say: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C.

    Args:
      args: The flags.
      bound: What ``take_address`` took.
      engine: The engine; nobody else may use it.
      tokenizer: Of the model.
      model: Name of the model if the flags give none.
      say: Called with a line for the user.
    """
    from qjax.serving.api import ServerSettings
    from qjax.serving.http_app import create_app, serve
    from qjax.serving.worker import EngineThread

    settings = ServerSettings(
        model=args.served_model_name or model,
        tokenizer=tokenizer,
        max_model_len=engine.config.max_model_len,
        defaults=sampling_defaults(args),
        max_new_tokens=args.max_new_tokens,
        seeds=random.Random(args.seed),
    )
    host, port, *_ = bound.getsockname()
    host = f"[{host}]" if ":" in host else host
    bound.listen()  # from here on clients wait for an answer, and are not refused
    say(f"serving {settings.model} at http://{host}:{port}/v1, Ctrl-C to stop")
    app = create_app(EngineThread(engine), settings, api_key=args.api_key)
    serve(app, bound, quiet=args.quiet)
