"""The HTTP server over real sockets: the answers of serve.py, from many clients, with any end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qjax.sampling import SamplingParams
from qjax.serving.api import ServerSettings
from qjax.serving.build import ModelChoices, build_engine, engine_config
from qjax.serving.engine import Engine
from qjax.serving.worker import EngineThread
from qjax.tokenizer import Tokenizer
from scripts import serve
from tests.serving_model import write_model

pytest.importorskip("starlette", reason="needs the extra server: pip install 'qjax[server]'")
pytest.importorskip("uvicorn", reason="needs the extra server: pip install 'qjax[server]'")

from qjax.serving import http_app  # noqa: E402
from qjax.serving.http_app import bind, create_app, make_server  # noqa: E402

ROOT = pathlib.Path(serve.__file__).resolve().parent.parent
PROMPTS = ["the cat", "a dog ran", "on the mat and the cat", "and"]
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
WAIT = 30  # seconds after which a test has failed; none waits so long


class Server:
    """A running server and its engine."""

    def __init__(self, engine: Engine, folder: pathlib.Path, api_key: str | None) -> None:
        self.engine, self.tokenizer = engine, Tokenizer.from_folder(folder)
        self.thread = EngineThread(engine)
        settings = ServerSettings("tiny", self.tokenizer, engine.config.max_model_len)
        self.bound = bind("127.0.0.1", 0)
        self.port = self.bound.getsockname()[1]
        self.uvicorn = make_server(create_app(self.thread, settings, api_key=api_key), quiet=True)

    def connect(self, path: str, body: Any = None, **headers: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        # So that the socket closes with the response.
        headers["Connection"] = "close"
        connection.request("GET" if body is None else "POST", path, data, headers)
        return connection.getresponse()

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON."""
        response = self.connect(path, body, **headers)
        return response.status, json.loads(response.read())

    def text(self, prompt: Any, **fields: Any) -> str:
        status, values = self.ask("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, values
        return values["choices"][0]["text"]

    def events(self, path: str, body: Any) -> list[Any]:
        """JSON of all events of a stream, which must end properly."""
        response = self.connect(path, {**body, "stream": True})
        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream"
        *events, done, rest = response.read().decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metrics(self) -> dict[str, float]:
        text = self.connect("/metrics").read().decode()
        return {m[1]: float(m[2]) for m in re.finditer(r"^qjax_(\S+) (\S+)$", text, re.MULTILINE)}

    def until(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Wait until the metrics say so."""
        deadline = time.monotonic() + WAIT
        while not condition(metrics := self.metrics()):
            assert time.monotonic() < deadline, metrics
            time.sleep(0.01)
        return metrics

    @contextlib.contextmanager
    def gated(self) -> Iterator[tuple[threading.Semaphore, threading.Event]]:
        """A semaphore that lets the engine make a step for each release; set while it waits."""
        gate, waits = threading.Semaphore(0), threading.Event()

        def gated(*args: Any) -> Any:
            waits.set()
            gate.acquire(timeout=WAIT)
            return step(*args)

        step = self.engine.step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine, "step", gated)
            try:
                yield gate, waits
            finally:
                gate.release(1000)

    def until_commands(self, count: int) -> None:
        """Wait until so many commands wait for the engine's thread."""
        deadline = time.monotonic() + WAIT
        while self.thread._commands.qsize() < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextlib.contextmanager
def running(engine: Engine, folder: pathlib.Path, api_key: str | None = None) -> Iterator[Server]:
    server = Server(engine, folder, api_key)
    thread = threading.Thread(target=server.uvicorn.run, kwargs={"sockets": [server.bound]})
    thread.start()
    deadline = time.monotonic() + WAIT
    while not server.uvicorn.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.uvicorn.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()
        server.bound.close()


def make_engine(folder: pathlib.Path) -> Engine:
    # Three slots and pages for two longest sequences: requests wait for either.
    config = engine_config(
        96, 16, max_running_requests=3, max_total_tokens=192, chunked_prefill_size=16
    )
    return build_engine(folder, ModelChoices(), config, progress=False)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: pathlib.Path) -> Iterator[Server]:
    with running(make_engine(model), model) as server:
        yield server


@pytest.fixture(scope="module")
def batch(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What serve.py writes for PROMPTS: greedy, sampled from the same seed, as chats."""
    folder = tmp_path_factory.mktemp("batch")
    lines: list[dict[str, Any]] = [{"prompt": p} for p in PROMPTS]
    lines += [{"prompt": PROMPTS[0], "temperature": 1.5, "seed": 7 + i} for i in range(3)]
    lines += [{"messages": [{"role": "user", "content": p}]} for p in PROMPTS]
    path, output = folder / "p.jsonl", folder / "out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--max-new-tokens", "24", "--ignore-eos", "--quiet", "--output", str(output)]
    sizes = ["--max-running-requests", "3", "--max-model-len", "96", "--page-size", "16"]
    sizes += ["--chunked-prefill-size", "16"]
    assert serve.main(["--model", str(model), "--prompts", str(path), *flags, *sizes]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def joined(events: list[Any], chat: bool = False) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    assert all(event["object"].endswith("chunk") == chat for event in events)
    return "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices)


def test_greedy_text_of_many_clients_is_that_of_serve_py(server, batch):
    def client(i: int) -> None:
        want, body = batch[i % 4]["text"], {"prompt": PROMPTS[i % 4], **GREEDY}
        if i % 2:
            assert joined(server.events("/v1/completions", body)) == want
        else:
            assert server.text(**body) == want

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(client, i) for i in range(12)]:
            future.result()
    # All prompts in one request, as texts and as token ids.
    ids = [server.tokenizer.encode(p) for p in PROMPTS]
    for prompts in (PROMPTS, ids):
        status, values = server.ask("/v1/completions", {"prompt": prompts, **GREEDY})
        assert status == 200 and values["object"] == "text_completion"
        choices = values["choices"]
        assert [c["text"] for c in choices] == [row["text"] for row in batch[:4]]
        assert [c["index"] for c in choices] == [0, 1, 2, 3]
        prompt = sum(map(len, ids))
        usage = {"prompt_tokens": prompt, "completion_tokens": 96, "total_tokens": prompt + 96}
        assert values["usage"] == usage
    metrics = server.until(lambda m: m["requests_running"] == 0)
    assert metrics["kv_pages_used"] == metrics["requests_waiting"] == 0
    assert metrics["kv_pages"] == 12 and metrics["generated_tokens_total"] >= 20 * 24
    assert metrics["generated_tokens_per_second"] > 0


def test_samples_repeat_and_choices_count_up_the_seed(server, batch):
    body = {"prompt": PROMPTS[0], **GREEDY, "temperature": 1.5, "seed": 7, "n": 3}
    status, values = server.ask("/v1/completions", body)
    texts = [choice["text"] for choice in values["choices"]]
    assert status == 200 and texts == [row["text"] for row in batch[4:7]]
    assert len(set(texts)) == 3
    streamed = server.events("/v1/completions", body)
    for index, want in enumerate(texts):
        parts = [c["text"] for e in streamed for c in e["choices"] if c["index"] == index]
        assert "".join(parts) == want
    # Without a seed, texts differ; the default temperature is 1.
    assert len({server.text("the", max_tokens=24, ignore_eos=True) for _ in range(2)}) == 2


def test_chat(server, batch):
    for prompt, row in zip(PROMPTS, batch[7:], strict=True):
        parts = [{"type": "text", "text": prompt[:2]}, {"type": "text", "text": prompt[2:]}]
        for content in (prompt, parts):
            message = {"role": "user", "content": content, "refusal": None}
            body = {"messages": [message], "model": "tiny", "user": "me", **GREEDY}
            body["max_completion_tokens"] = body.pop("max_tokens")
            status, values = server.ask("/v1/chat/completions", body)
            assert status == 200 and values["object"] == "chat.completion"
            (choice,) = values["choices"]
            assert choice["message"] == {"role": "assistant", "content": row["text"]}
            assert choice["finish_reason"] == "length"
    body["stream_options"] = {"include_usage": True}
    first, *events, last = server.events("/v1/chat/completions", body)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(events, chat=True) == row["text"]
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["length"]
    assert last["choices"] == [] and last["usage"] == values["usage"]
    assert all(event["usage"] is None for event in events)
    # A chat without a limit fills the context.
    body = {"messages": [{"role": "user", "content": "the cat"}], "ignore_eos": True}
    status, values = server.ask("/v1/chat/completions", body)
    assert values["usage"]["total_tokens"] == 96


def test_a_stop_string_ends_the_text_and_frees_the_slot(server, batch, monkeypatch):
    whole = batch[0]["text"]
    stop = next(whole[i : i + 3] for i in range(4, 99) if whole.find(whole[i : i + 3]) == i)
    want = whole[: whole.index(stop)]
    before, step = server.metrics(), server.engine.step
    # All 80 tokens take it a few milliseconds, in which the stop might not reach it.
    monkeypatch.setattr(server.engine, "step", lambda *args: time.sleep(0.3) or step(*args))
    body = {"prompt": PROMPTS[0], **GREEDY, "max_tokens": 80, "stop": ["no such text", stop]}
    status, values = server.ask("/v1/completions", body)
    (choice,) = values["choices"]
    assert choice == {"index": 0, "text": want, "logprobs": None, "finish_reason": "stop"}
    assert values["usage"]["completion_tokens"] < 24
    events = server.events("/v1/completions", body)
    assert joined(events) == want and events[-1]["choices"][0]["finish_reason"] == "stop"
    name = 'requests_total{reason="cancelled"}'
    after = server.until(lambda m: m[name] == before[name] + 2)
    assert after["requests_running"] == after["kv_pages_used"] == 0


def test_a_client_that_goes_away_frees_its_slots_and_pages(server, batch):
    before = server.metrics()
    body = {"prompt": PROMPTS * 2, **GREEDY, "max_tokens": 80}
    with server.gated() as (gate, waits):
        streaming = server.connect("/v1/completions", {**body, "stream": True})
        assert waits.wait(WAIT) and server.metrics()["requests_waiting"] == 8
        silent = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
        silent.request("POST", "/v1/completions", json.dumps(body))
        server.until_commands(1)
        gate.release()
        assert b"choices" in streaming.readline()  # the first tokens are there
        metrics = server.until(lambda m: m["requests_waiting"] > 8)
        assert metrics["kv_pages_used"] == 12 and metrics["requests_running"] == 2
        streaming.close()
        silent.close()
        server.until_commands(16)
        gate.release(1000)
        assert server.text(PROMPTS[1], **GREEDY) == batch[1]["text"]
        after = server.until(lambda m: m["requests_running"] + m["requests_waiting"] == 0)
    name = 'requests_total{reason="cancelled"}'
    assert after[name] - before[name] == 16 and after["kv_pages_used"] == 0


def test_an_error_of_one_request_leaves_the_others_alone(server, batch, monkeypatch):
    call = server.engine._call

    def broken(name: str, program: Any, argument: Any, tasks: Any) -> Any:
        result = call(name, program, argument, tasks)
        for task in tasks:
            if task.request.params.seed == 666 and task.tokens:
                task.error = "logits are not finite"
        return result

    monkeypatch.setattr(server.engine, "_call", broken)
    bad = {"prompt": PROMPTS[0], **GREEDY, "seed": 666}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        good = pool.submit(lambda: server.text(PROMPTS[1], **GREEDY))
        stream = pool.submit(lambda: server.events("/v1/completions", bad))
        status, values = server.ask("/v1/completions", bad)
        assert (status, values["error"]["type"]) == (500, "server_error")
        assert values["error"]["message"] == "logits are not finite"
        assert stream.result()[-1]["error"] == values["error"]
        assert good.result() == batch[1]["text"]
    assert server.ask("/health") == (200, {"status": "ok"})
    assert server.metrics()["kv_pages_used"] == 0


CHAT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "the body is not JSON"),
        (b"[" * 100_000, 400, None, "the body is not JSON"),
        (b'{"prompt": "\\ud800"}', 400, None, "half of a surrogate pair"),
        ([1], 400, None, "the body must be a JSON object, not [1]"),
        ({}, 400, "prompt", "prompt must be a text, a list of texts"),
        ({"prompt": [["a"]]}, 400, "prompt", "none of them empty; it is [[\"a\"]]"),
        ({"prompt": ""}, 400, "prompt", "a prompt is empty"),
        ({"prompt": [999]}, 400, "prompt", "the model's vocabulary is 0..287"),
        ({"prompt": [10**30]}, 400, "prompt", "the model's vocabulary is 0..287"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature", "did you mean temperature?"),
        ({"prompt": "a", "beams": 4}, 400, "beams", "unknown field \"beams\"; known are prompt"),
        ({"prompt": "a", "logprobs": 0}, 400, "logprobs", "logprobs=0 is not supported"),
        ({"prompt": "a", "echo": True}, 400, "echo", "echo=true is not supported"),
        ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
        ({"prompt": "a", "temperature": "1"}, 400, "temperature", "must be a number, not \"1\""),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "must lie in [0, 1e4]"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "temperature=nan"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p", "top_p=0.0 must lie in (0, 1]"),
        ({"prompt": "a", "top_k": 2**31}, 400, "top_k", "top_k=2147483648 is too large"),
        ({"prompt": "a", "seed": -1}, 400, "seed", "seed=-1 must lie in [0, 4294967295]"),
        ({"prompt": "a", "seed": True}, 400, "seed", "seed must be an integer, not true"),
        ({"prompt": "a", "n": 129}, 400, "n", "there may be 1 to 128"),
        ({"prompt": "a", "n": 2, "temperature": 0}, 400, "n", "the same text 2 times"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "none of them empty"),
        ({"prompt": "a", "stop": 5}, 400, "stop", "it is 5"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens=0 must be at least 1"),
        ({"prompt": "a", "max_tokens": 96}, 400, "prompt", "lower max_tokens to 95, or shorten"),
        ({"prompt": [5] * 96}, 400, "prompt", "the prompt has 96 tokens, with a new token more"),
        ({"prompt": "a", "stream_options": {}}, 400, "stream_options", "no use without stream"),
        ({"prompt": "a", "model": "x"}, 404, "model", "the model is 'tiny'"),
        ({"messages": []}, 400, "messages", "messages must be a list of messages, not []"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "messages[0].content must be a text"),
        ({"messages": [{"content": "a"}]}, 400, "messages", "must be an object with role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400, "messages", "only parts with type text",
        ),
        (
            {"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]},
            400, "messages[0].tool_call_id", "a message has role and content",
        ),
        ({**CHAT, "tools": [{"type": "function"}]}, 400, "tools", "is not supported; leave it out"),
        ({**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", "supported"),
        ({**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, 400, None, "differ"),
        ({**CHAT, "chat_template_kwargs": {"self": 1}}, 400, "chat_template_kwargs", "'self'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_nothing_runs(server, body, status, param, message):
    chat = isinstance(body, dict) and "messages" in body
    submitted = server.engine.next_id
    got, values = server.ask("/v1/chat/completions" if chat else "/v1/completions", body)
    assert got == status and set(values) == {"error"}
    error = values["error"]
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert server.engine.next_id == submitted


def test_what_asks_for_nothing_is_accepted(server, batch):
    more = {"frequency_penalty": 0.0, "logit_bias": {}, "echo": False, "top_k": -1, "stop": None}
    assert server.text(PROMPTS[0], **GREEDY, **more) == batch[0]["text"]


def test_other_paths(server):
    (model,) = server.ask("/v1/models")[1]["data"]
    assert model["id"] == "tiny" and server.ask("/v1/models/tiny") == (200, model)
    assert [server.ask(path)[0] for path in ("/v1/models/a/b", "/v1/engines")] == [404, 404]
    status, values = server.ask("/v1/completions")
    assert status == 405 and values["error"]["message"].startswith("GET /v1/completions")
    assert server.ask("/v1/completions", b" " * (32 * 2**20 + 1))[0] == 413


def test_api_key_and_an_engine_that_breaks(model, monkeypatch, caplog):
    engine = make_engine(model)

    def fail(_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "step", fail)
    with running(engine, model, api_key="s\u00e9same") as server:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "s\u00e9same"}):
            status, values = server.ask("/v1/models", **headers)
            assert (status, values["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask("/health")[0] == 200
        key = {"Authorization": "Bearer s\u00e9same"}
        for _ in range(2):  # while it breaks, and after
            status, values = server.ask("/v1/completions", {"prompt": PROMPTS}, **key)
            assert (
                status == 503 and "the engine failed (RuntimeError)" in values["error"]["message"]
            )
        assert server.ask("/health")[0] == 503
    assert "out of memory" in caplog.text


def test_requests_that_do_not_end_are_told_at_shutdown(model, monkeypatch):
    engine, release, waits = make_engine(model), threading.Event(), threading.Event()

    def hang(_: Any) -> list[Any]:
        waits.set()
        release.wait(WAIT)
        return []

    monkeypatch.setattr(engine, "step", hang)
    monkeypatch.setattr(http_app, "GRACE_SECONDS", 0.1)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with running(engine, model) as server:
            stream = pool.submit(server.events, "/v1/completions", {"prompt": "a"})
            assert waits.wait(WAIT)
            whole = pool.submit(server.ask, "/v1/completions", {"prompt": "a"})
            server.until_commands(1)
            server.uvicorn.should_exit = True
            status, values = whole.result(WAIT)
            release.set()
        assert (status, values["error"]["message"]) == (503, "the server is shutting down")
        assert stream.result(WAIT) == [values]


def serve_main(model: pathlib.Path, *flags: Any) -> int:
    return serve.main(["--model", str(model), "--quiet", *map(str, flags)])


def test_flags_that_do_not_fit_are_errors(model, server, capsys):
    for flags, message in (
        (("--host", "::1", "--prompt", "a"), "--host has no use without --port"),
        (("--api-key", "x"), "--api-key has no use without --port"),
        (("--port", 0, "--prompt", "a"), "--prompt has no use with --port"),
        (("--port", 0, "--chat"), "--chat has no use with --port"),
        (("--port", 0, "--api-key", ""), "--api-key is empty"),
        (("--port", 0, "--temperature", -1), "temperature=-1.0 must lie"),
        (("--port", 0, "--max-new-tokens", 0), "max_new_tokens=0 must be at least 1"),
        (("--port", server.port), f"--port {server.port} cannot be had"),
        (("--port", 99999), "--port 99999 must lie in"),
    ):
        assert serve_main(model, *flags) == 2
        assert message in capsys.readouterr().err


def test_ctrl_c_lets_running_requests_end(model):
    # Shells start background jobs (a CI run, say) with SIGINT ignored, and so run their children.
    launcher = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = ROOT / "scripts" / "serve.py"
    flags = ["--model", model, "--port", 0, "--served-model-name", "cat", "--ignore-eos"]
    flags += ["--max-running-requests", 1]
    command = [sys.executable, "-c", launcher, script, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "startup complete" in line:
                break
        (port,) = re.findall(r"serving cat at http://127.0.0.1:(\d+)/v1", "".join(lines))
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        body = {"prompt": "the", "max_tokens": 100, "stream": True, "model": "cat"}
        for n in (1, 32):  # the first one compiles; the second one has a lot to do
            connection.request("POST", "/v1/completions", json.dumps({**body, "n": n}))
            response = connection.getresponse()
            text = response.readline().decode() if n > 1 else response.read().decode()
        process.send_signal(signal.SIGINT)
        text += response.read().decode()
        connection.close()
        assert text.count('"finish_reason":"length"') == 32 and text.endswith("data: [DONE]\n\n")
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 0, error
        assert "decode" in error and "Traceback" not in error
    finally:
        process.kill()
        process.wait()


def test_defaults_of_the_server(model):
    parse = serve.build_parser().parse_args
    flags = serve.sampling_defaults(parse(["--port", "1"]))
    assert flags == SamplingParams(temperature=1.0)
    assert serve.sampling_defaults(parse([])) == SamplingParams()
    flags = serve.sampling_defaults(parse(["--port", "1", "--temperature", "0", "--top-k", "3"]))
    assert flags == SamplingParams(temperature=0.0, top_k=3)
