"""What no client should send, and clients that leave: each has its own answer, and the server goes on."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fixtures import Running, running, wait_for

from whalepod.serve.http.api_error import ApiError
from whalepod.serve.http.job import JobMaker
from whalepod.serve.http.server import ServerConfig
from whalepod.spec.errors import UserError

USER = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
KEYS = [
    "messages", "prompt", "role", "content", "type", "text", "name", "function", "parameters", "tools",
    "tool_choice", "tool_calls", "arguments", "response_format", "json_schema", "schema", "$ref",
    "pattern", "properties", "n", "stop", "seed", "logprobs", "top_logprobs", "chat_template_kwargs",
    "guided_regex", "guided_json", "temperature", "structured_outputs", "max_tokens", "top_k",
    "stop_token_ids", "stream", "stream_options", "model", "thinking",
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def shared(deepseek):
    """For requests that leave nothing behind."""
    with running(*deepseek) as found:
        yield found


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return error["message"]


def post_raw(server: Running, body: bytes, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    return server.post(path, content=body, headers={"Content-Type": "application/json", **headers})


def connect(server: Running) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=20)


def request_bytes(body: dict, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def received(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def schema_request(schema: object) -> dict:
    return {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


DEEP = b'{"prompt": "a", "user": ' + b"[" * 100 + b"]" * 100 + b"}"
SPLIT = b'{"prompt": "half \\ud800 a pair"}'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "a"} x', "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"' + b"a" * 100 + b'"', "must be a JSON object"),
        (DEEP, "deep"),
        (b"[" * 1_000_000, "deep"),
        (b'{"a":' * 300_000, "deep"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        (SPLIT, "surrogate"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "too large"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 100 + b"}", "digits"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 10_000 + b"}", "digits"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 30 + b"}", "seed"),
        (b'{"prompt": "a", "seed": -1}', "seed"),
    ],
    ids=range(18),
)
def test_bad_bodies(shared, body, message) -> None:
    for path in ("/v1/completions", CHAT):
        if path == "/v1/completions" or b"prompt" not in body:
            assert message in error_of(post_raw(shared, body, path), 400)
    assert not shared.service.asked


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3), ("max_tokens", "9"), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 10**9),
        ("max_tokens", 10**30), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", "hot"),
        ("temperature", -1), ("temperature", 1e300), ("top_p", 0), ("top_p", 1.5), ("top_k", -2),
        ("min_p", 2), ("n", 0), ("n", 17), ("n", 10**12), ("stop", 3), ("stop", [""]),
        ("stop", ["a"] * 17), ("stop", "a" * 2000), ("seed", "x"), ("stream", "yes"),
        ("stream_options", {"include_usage": True}), ("repetition_penalty", 0), ("presence_penalty", 3),
        ("logprobs", 21), ("logit_bias", {"1": 100}), ("echo", True), ("suffix", "x"), ("best_of", 3),
        ("stop_token_ids", [-1]), ("stop_token_ids", "x"), ("prompt", None), ("prompt", []),
        ("prompt", [[]]), ("prompt", 3), ("prompt", [1, "a"]), ("prompt", [-1]), ("prompt", [10**6]),
        ("prompt", [2**70]), ("prompt", {}), ("prompt", ["a"] * 129), ("guided_regex", "a" * 5000),
        ("guided_regex", "a{99999}"), ("guided_regex", 3), ("structured_outputs", {"choice": ["a"]}),
    ],
)  # fmt: skip
def test_bad_values(shared, field, value) -> None:
    assert error_of(shared.post(json={"prompt": "a", field: value}), 400)
    assert not shared.service.asked


@pytest.mark.parametrize(
    "change",
    [
        {"messages": None}, {"messages": []}, {"messages": "x"}, {"messages": [3]}, {"messages": [[]]},
        {"messages": [{"role": "king", "content": "x"}]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": {}}]}, {"messages": [{"role": "user", "content": [3]}]},
        {"top_logprobs": 3}, {"logprobs": 3}, {"tools": [{}]}, {"tools": "x"}, {"tool_choice": "required"},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]}, {"functions": [{"name": "x"}]},
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        {"chat_template_kwargs": {"messages": []}}, {"chat_template_kwargs": {"self": 1}},
        {"chat_template_kwargs": {"prompt": True}}, {"chat_template_kwargs": []},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ],
    ids=range(25),
)  # fmt: skip
def test_bad_chats(shared, change) -> None:
    assert error_of(shared.post(CHAT, {"messages": USER, **change}), 400)
    assert not shared.service.asked


WORDS = ["a", "user", "function", "auto", "required", "json_schema", "object", "<think>", "#/x"]
SCALARS = [st.none(), st.booleans(), st.integers(), st.text(), st.sampled_from(WORDS)]
VALUES = st.recursive(
    st.one_of(*SCALARS, st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(fields=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), change=st.booleans())
def test_any_json_is_a_job_or_a_refusal(deepseek, fields, change) -> None:
    maker = JobMaker(*deepseek, ServerConfig("whale"))
    valid = {"messages": USER, "prompt": "a", "tools": [TOOL]}
    body = json.dumps({**valid, **fields} if change else {**fields, **valid}).encode()
    for make in (maker.chat, maker.completion):
        with suppress(ApiError, UserError):
            assert make(body).requests


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(40),
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "minItems": 10**18},
        {"enum": list(range(9000))},
        {"description": "a" * 70_000},
        {"$ref": "http://169.254.169.254/latest"},
        {"type": "string", "pattern": "(a{1,99999}){1,99999}"},
        {"type": "string", "pattern": "a" * 5000},
        [],
        "x",
    ],
    ids=range(10),
)
def test_schema_bombs(shared, schema) -> None:
    assert error_of(shared.post(CHAT, schema_request(schema)), 400)
    assert not shared.service.asked


def test_a_body_has_a_limit(deepseek) -> None:
    with running(*deepseek, max_body_bytes=100_000) as server:
        large = json.dumps({"prompt": "a" * 200_000}).encode()
        assert "100000 bytes" in error_of(post_raw(server, large), 413)
        pieces = (large[i : i + 1000] for i in range(0, len(large), 1000))  # chunked: no Content-Length
        headers = {"Content-Type": "application/json"}
        assert error_of(server.post(content=pieces, headers=headers), 413)
        with connect(server) as connection:  # chunks without an end, from one who does not listen
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            )
            connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
            with pytest.raises(OSError, match=r"reset|pipe"):
                connection.sendall(chunk * 2000)
        assert not server.service.asked
        assert server.post(json={"prompt": "a"}).status_code == 200


def test_a_prompt_has_a_limit(deepseek) -> None:
    with running(*deepseek, max_prompt_tokens=1000, max_body_bytes=16 << 20) as server:
        for text in ("ab " * 1000, "ab " * 30_000, "日本" * 1_600_000):
            assert "at most 1000 tokens" in error_of(server.post(json={"prompt": text}), 400)
            message = [{"role": "user", "content": text}]
            assert "at most 1000 tokens" in error_of(server.post(CHAT, {"messages": message}), 400)
        assert error_of(server.post(json={"prompt": [5] * 1001}), 400)
        assert error_of(server.post(CHAT, {"messages": USER * 1001}), 400)
        assert server.post(json={"prompt": [5] * 1000}).status_code == 200


def test_the_server_answers_while_a_large_prompt_is_read(deepseek) -> None:
    with running(*deepseek, max_prompt_tokens=4 << 20, max_body_bytes=16 << 20) as server:
        done = threading.Event()

        def ask() -> None:
            server.post(json={"prompt": "some words " * 150_000})
            done.set()

        asking = threading.Thread(target=ask)
        asking.start()
        answered = 0
        while not done.is_set():
            assert server.get("/health").status_code == 200
            answered += not done.is_set()
        asking.join()
        assert answered > 5
        assert len(server.service.asked) == 1


def test_only_json_is_read(server) -> None:
    body = b'{"prompt": "a"}'
    for headers in (
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ):
        assert error_of(server.post(content=body, headers=headers), 415)
    assert error_of(post_raw(server, body, **{"Content-Encoding": "gzip"}), 415)
    assert post_raw(server, body, **{"Content-Type": "application/json; charset=utf-8"}).status_code == 200


def test_wrong_paths_and_methods(server) -> None:
    assert error_of(server.get("/v2"), 404)
    assert error_of(server.get("/v1/completions"), 405)
    assert error_of(server.post("/health"), 405)
    assert error_of(server.get("/v1/models/%00%ff/../x"), 404)
    for path in ("/docs", "/openapi.json"):
        assert server.get(path).status_code == 404


def test_no_room(deepseek) -> None:
    with running(*deepseek, max_concurrent=2) as server:
        server.service.hold.set()
        threads = [threading.Thread(target=server.post, kwargs={"json": {"prompt": "a"}}) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.service.running == 2)
        refused = server.post(json={"prompt": "a"})
        assert error_of(refused, 429)
        assert refused.headers["retry-after"] == "1"
        assert server.get("/ready").status_code == 200
        server.service.hold.clear()
        for thread in threads:
            thread.join()
        assert server.post(json={"prompt": "a"}).status_code == 200
        server.service.limit = 0  # the engine's own queue
        for stream in (False, True):
            refused = server.post(json={"prompt": "a", "stream": stream})
            assert error_of(refused, 429) == "the queue is full: try again later"
            assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server, stream) -> None:
    server.service.hold.set()
    with connect(server) as connection:
        connection.sendall(request_bytes({"prompt": "a", "n": 3, "stream": stream}))
        wait_for(lambda: server.service.running == 3)
        if stream:
            assert b"text/event-stream" in connection.recv(4096)
        assert not server.service.closed
    wait_for(lambda: server.service.running == 0)
    assert len(server.service.closed) == 3
    assert not server.service.finished
    wait_for(lambda: server.metric("whalepod_requests_in_flight") == 0)


def test_a_client_that_does_not_read(deepseek) -> None:
    with running(*deepseek, send_timeout_s=0.3, max_new_tokens=200_000, max_prompt_tokens=9) as server:
        server.service.reply = lambda _: "some words and more " * 40_000
        with connect(server) as connection:
            connection.sendall(request_bytes({"prompt": "a", "max_tokens": 200_000, "stream": True}))
            wait_for(lambda: server.service.closed)
            assert server.service.running == 0


def test_bodies_that_do_not_arrive(deepseek) -> None:
    with running(*deepseek, body_timeout_s=0.3) as server:
        whole = request_bytes({"prompt": "a"})
        with connect(server) as connection:
            connection.sendall(whole[:-3])
        with connect(server) as connection:
            connection.sendall(whole[:-3])
            assert b" 408 " in received(connection)  # and it is closed
        with connect(server) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert b" 400 " in received(connection)
        with connect(server) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100_000)
            assert b" 4" in connection.recv(100)
        assert not server.service.asked
        assert server.post(json={"prompt": "a"}).status_code == 200


def test_connections_that_ask_for_nothing(deepseek) -> None:
    with running(*deepseek, head_timeout_s=0.3, max_connections=4) as server:
        silent = [connect(server) for _ in range(4)]
        refused = server.get("/health")
        assert refused.status_code == 503
        silent[0].sendall(b"GET /health HTTP/1.1\r\nA: b\r\n")
        for connection in silent:
            assert received(connection) == b""
            connection.close()
        assert server.get("/health").status_code == 200
        server.service.hold.set()  # one that waits for its answer has asked
        with connect(server) as connection:
            connection.sendall(request_bytes({"prompt": "a"}))
            threading.Event().wait(1)
            server.service.hold.clear()
            assert b" 200 " in connection.recv(100)


def test_an_answer_has_a_time_limit(deepseek) -> None:
    with running(*deepseek, request_timeout_s=0.2) as server:
        server.service.hold.set()
        assert "longer than 0.2 s" in error_of(server.post(json={"prompt": "a"}), 504)
        streamed = server.post(json={"prompt": "a", "stream": True})
        assert '"error": {"message": "the answer took longer' in streamed.text
        assert "[DONE]" not in streamed.text
        wait_for(lambda: len(server.service.closed) == 2)


def test_a_drain_lets_answers_finish(server) -> None:
    server.service.hold.set()
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(server.post(json={"prompt": "a", "stream": True})))
    thread.start()
    wait_for(lambda: server.service.running == 1)
    server.server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: server.get("/ready").status_code == 503)
    assert server.get("/health").status_code == 200
    refused = server.post(json={"prompt": "a"})
    assert "shutting down" in error_of(refused, 503)
    assert refused.headers["retry-after"] == "1"
    assert server.thread.is_alive()
    server.service.hold.clear()
    server.thread.join(20)
    thread.join(20)
    assert not server.thread.is_alive()
    assert found[0].text.endswith("data: [DONE]\n\n")


def test_a_drain_has_an_end(deepseek) -> None:
    with running(*deepseek, drain_timeout_s=0.2) as server:
        server.service.hold.set()
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(server.post(json={"prompt": "a"})))
        thread.start()
        wait_for(lambda: server.service.running == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert "before the answer was complete" in error_of(found[0], 503)
        server.thread.join(20)
        assert not server.thread.is_alive()


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from fake_service import FakeService
from whalepod.serve.http.server import ServerConfig, make_app, run_server
from whalepod.text.tokenizer import load_tokenizer
tokenizer = load_tokenizer({tokenizer!r})
service = FakeService(tokenizer)
service.delay = 0.2
service.reply = lambda _: "abcdefgh"
app = make_app(service, tokenizer, None, ServerConfig("whale"))
run_server(app, port=0, on_start=lambda url: print(url, flush=True))
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_process(deepseek, tmp_path, end) -> None:
    file = deepseek[0].save(tmp_path / "tokenizer.json")
    program = PROGRAM.format(folder=str(Path(__file__).parent), tokenizer=str(file))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        body = {"prompt": "a", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(end)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0
