"""OpenAI's HTTP interface to an engine: completions, chats, models, health and metrics.

Needs the extra ``server`` (starlette, uvicorn).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise ImportError(
        f"serving over HTTP needs {error.name}: pip install 'qjax[server]'", name=error.name
    ) from None

from qjax.serving.api import APIError, Order, ServerSettings, read_order
from qjax.serving.choices import ChoiceText
from qjax.serving.metrics import CONTENT_TYPE, prometheus_text
from qjax.serving.worker import EngineDown, EngineThread, RequestFailed, TokenFeed

MAX_BODY_BYTES = 32 * 2**20
GRACE_SECONDS = 10
"""How long running requests may go on after Ctrl-C."""

_Result = TypeVar("_Result")
_Handler = Callable[[Request], Awaitable[Any]]


def create_app(
    thread: EngineThread, settings: ServerSettings, *, api_key: str | None = None
) -> Starlette:
    """The ASGI application.

    Args:
      thread: Of the engine; started and closed with the application.
      settings: Model, tokenizer and defaults.
      api_key: What clients must send as a bearer token, except to ``/health`` and ``/metrics``.
    """
    server = _Server(thread, settings)

    def guarded(handler: _Handler) -> _Handler:
        async def checked(request: Request) -> Any:
            given = request.headers.get("authorization", "")
            wanted = f"Bearer {api_key}"
            if api_key is not None and not hmac.compare_digest(given.encode(), wanted.encode()):
                raise APIError(
                    "the API key is missing or wrong; send the server's --api-key as "
                    "'Authorization: Bearer KEY'",
                    status=401,
                    code="invalid_api_key",
                )
            return await handler(request)

        return checked

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        thread.start()
        yield
        await asyncio.to_thread(thread.close)

    routes = [
        Route("/v1/completions", guarded(server.completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(server.chat_completions), methods=["POST"]),
        Route("/v1/models", guarded(server.models)),
        Route("/v1/models/{name:path}", guarded(server.models)),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
    ]
    handlers: Any = {APIError: _api_error, HTTPException: _http_error, Exception: _bug}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def bind(host: str, port: int) -> socket.socket:
    """A socket that is taken but does not listen yet: clients are refused until the server runs.

    Args:
      host: Address or name.
      port: 0 for any free one.

    Raises:
      ValueError: If there is no such address, or it is taken.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} must lie in [0, 65535]; 0 is any free one")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be had ({error}); choose another address, or "
            "port 0 for any free one"
        ) from None
    return bound


def make_server(app: Starlette, *, quiet: bool = False) -> uvicorn.Server:
    """A server that gives running requests ``GRACE_SECONDS`` to end when it is stopped.

    Args:
      app: The application.
      quiet: Log warnings and errors only.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_level="warning" if quiet else "info",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)


def serve(app: Starlette, bound: socket.socket, *, quiet: bool = False) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
      app: The application.
      bound: Socket from ``bind``.
      quiet: As in ``make_server``.

    Raises:
      RuntimeError: If the server could not start.
    """
    server = make_server(app, quiet=quiet)
    # uvicorn raises the signal once more after its shutdown.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[bound])
    if not server.started:
        raise RuntimeError("the HTTP server could not start; the reason is logged above")


class _Server:
    """The handlers."""

    def __init__(self, thread: EngineThread, settings: ServerSettings) -> None:
        self.thread, self.settings = thread, settings
        self.created = int(time.time())

    async def completions(self, request: Request) -> Any:
        return await self._answer(request, chat=False)

    async def chat_completions(self, request: Request) -> Any:
        return await self._answer(request, chat=True)

    async def models(self, request: Request) -> Response:
        model = {
            "id": self.settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "qjax",
            "max_model_len": self.settings.max_model_len,
        }
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != self.settings.model:
            raise APIError(f"there is no model {name!r}; this is {model['id']!r}", status=404)
        return JSONResponse(model)

    async def health(self, _: Request) -> Response:
        if self.thread.failure is not None:
            raise APIError(self.thread.failure, status=503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        text = prometheus_text(self.thread.load, time.monotonic())
        return Response(text, media_type=CONTENT_TYPE)

    async def _answer(self, request: Request, *, chat: bool) -> Any:
        try:
            body = await _body(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        # Long texts take a while to tokenize; others need not wait for it.
        order = await asyncio.to_thread(read_order, body, self.settings, chat=chat)
        try:
            feed = self.thread.submit(order.requests)
        except ValueError as error:
            raise APIError(str(error), param="messages" if chat else "prompt") from None
        except EngineDown as error:
            raise APIError(str(error), status=503) from None
        answer = _Answer(self.thread, self.settings, order, feed)
        if order.stream:
            return answer  # called by starlette to send itself
        try:
            values = await _until_gone(request.receive, answer.whole())
        except asyncio.CancelledError:  # by uvicorn, when the time after Ctrl-C is over
            raise _shutting_down() from None
        finally:
            self.thread.cancel(feed)
        return Response(status_code=400) if values is None else JSONResponse(values)


class _Answer:
    """What becomes of one order."""

    def __init__(
        self, thread: EngineThread, settings: ServerSettings, order: Order, feed: TokenFeed
    ) -> None:
        self.thread, self.order, self.feed = thread, order, feed
        stream = settings.tokenizer.stream
        self.choices = [ChoiceText(stream(r.prompt), order.stops) for r in order.requests]
        kind = "chat.completion" if order.chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if order.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + (".chunk" if order.chat and order.stream else ""),
            "created": int(time.time()),
            "model": settings.model,
        }

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """Index of a choice and new text of it."""
        try:
            async for index, tokens, reason in self.feed:
                choice = self.choices[index]
                piece = choice.push(tokens, reason)
                if reason is None and choice.finish_reason is not None:
                    self.thread.cancel(self.feed, index)  # at a stop string
                yield index, piece
        except RequestFailed as error:
            raise APIError(str(error), status=500) from None
        except EngineDown as error:
            raise APIError(str(error), status=503) from None

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts = [""] * len(self.choices)
        async for index, piece in self.pieces():
            texts[index] += piece
        choices = []
        for index, (text, choice) in enumerate(zip(texts, self.choices, strict=True)):
            content = (
                {"message": {"role": "assistant", "content": text}}
                if self.order.chat
                else {"text": text}
            )
            choices.append(self.choice(index, content, choice.finish_reason))
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it as server-sent events."""
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                await _until_gone(receive, self.send_events(send))
            except asyncio.CancelledError:  # by uvicorn, when the time after Ctrl-C is over
                await _send_end(send, _shutting_down())
        finally:
            self.thread.cancel(self.feed)

    async def send_events(self, send: Send) -> None:
        try:
            async for values in self.chunks():
                await _send_event(send, _dump(values))
        except APIError as error:
            await _send_end(send, error)
        else:
            await _send_end(send)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces."""
        extra = {"usage": None} if self.order.include_usage else {}
        if self.order.chat:
            for index in range(len(self.choices)):
                delta = {"delta": {"role": "assistant", "content": ""}}
                yield {**self.head, "choices": [self.choice(index, delta, None)], **extra}
        async for index, piece in self.pieces():
            reason = self.choices[index].finish_reason
            if piece or reason is not None:
                content = (
                    {"delta": {"content": piece} if piece else {}}
                    if self.order.chat
                    else {"text": piece}
                )
                yield {**self.head, "choices": [self.choice(index, content, reason)], **extra}
        if self.order.include_usage:
            yield {**self.head, "choices": [], "usage": self.usage()}

    def choice(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def usage(self) -> dict[str, int]:
        prompt, new = self.order.prompt_tokens, sum(c.tokens for c in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _dump(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


async def _send_event(send: Send, data: str) -> None:
    event = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": event, "more_body": True})


async def _send_end(send: Send, error: APIError | None = None) -> None:
    if error is not None:
        await _send_event(send, _dump(error.body()))
    await _send_event(send, "[DONE]")
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _shutting_down() -> APIError:
    return APIError("the server is shutting down", status=503)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise APIError(f"the body has more than {MAX_BODY_BYTES} bytes; shorten it", status=413)
    return bytes(body)


async def _until_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """Do work while the client is there; None if it went away before the end."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = job, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return job.result() if job.done() else None
    finally:
        job.cancel()
        watch.cancel()
        await asyncio.gather(job, watch, return_exceptions=True)


async def _api_error(_: Request, error: Any) -> Response:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}; see /v1/models and README.md"
    shaped = APIError(message, status=error.status_code)
    return JSONResponse(shaped.body(), status_code=error.status_code, headers=error.headers)


async def _bug(_: Request, error: Any) -> Response:
    shaped = APIError(f"the server failed ({type(error).__name__}); its log tells", status=500)
    return JSONResponse(shaped.body(), status_code=500)
