"""The OpenAI-compatible endpoint, asked with OpenAI's own client and with bytes that no client sends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from engine_core import http  # noqa: E402
from engine_core.errors import ConfigurationError, InvalidRequestError  # noqa: E402
from engine_core.http.fields import parse_object  # noqa: E402
from engine_core.http.limits import HttpLimits  # noqa: E402
from engine_core.http.server import HttpServer, read_keys  # noqa: E402
from engine_core.request import RequestDefaults, SamplingParams  # noqa: E402
from http_endpoint import MODEL, Endpoint, parse  # noqa: E402

HELLO = [{"role": "user", "content": "hello"}]
LIMITS = HttpLimits(connections=8, header_time=0.3, body_time=0.3, body_bytes=20_000, write_time=0.5)


@pytest.fixture
def serve(open_engine):
    endpoints = []

    def make(script=None, *, backend=None, **options):
        endpoints.append(Endpoint(open_engine(script, **(backend or {})), **options))
        return endpoints[-1]

    yield make
    for endpoint in endpoints:
        endpoint.close()


@pytest.fixture(scope="class")
def endpoint(tokenizer_dir):
    import fakes

    engine = fakes.make_engine(fakes.ScriptedBackend(max_context=1024), tokenizer_dir)
    endpoint = Endpoint(engine, limits=dataclasses.replace(LIMITS, connections=64, body_bytes=1 << 20))
    yield endpoint
    endpoint.close()
    engine.close()


class TestOpenAIClient:
    def test_models(self, endpoint):
        with endpoint.client() as client:
            assert [model.id for model in client.models.list()] == [MODEL]
            assert client.models.retrieve(MODEL).max_model_len == 1024
            with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served here; there is fake"):
                client.chat.completions.create(model="gpt-4o", messages=HELLO)
            with pytest.raises(openai.NotFoundError) as error:
                client.models.retrieve("gpt-4o")
        assert (error.value.code, error.value.param, error.value.type) == (
            "model_not_found", "model", "invalid_request_error",
        )  # fmt: skip

    def test_a_whole_answer_and_its_stream_are_one_text(self, endpoint):
        with endpoint.client() as client:
            whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20)
            chunks = list(
                client.chat.completions.create(
                    model=MODEL, messages=HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}
                )
            )
        (choice,) = whole.choices
        assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
        assert whole.usage.completion_tokens == 20
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + 20
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content != ""
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "length"]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # by the first request
        assert whole.edgellm["finish_reason"] == "length" and whole.edgellm["time_to_first_token"] > 0

    def test_completions(self, endpoint):
        with endpoint.client() as client:
            whole = client.completions.create(model=MODEL, prompt="once", max_tokens=9)
            chunks = list(client.completions.create(model=MODEL, prompt=["once"], max_tokens=9, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
        assert whole.usage.prompt_tokens == 4 and chunks[-1].choices[0].finish_reason == "length"

    def test_the_asynchronous_client(self, endpoint):
        import asyncio

        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{endpoint.server.url}/v1", api_key="x", max_retries=0) as client:

                async def one(text: str) -> str:
                    messages = [{"role": "user", "content": text}]
                    stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

                return await asyncio.gather(*(one(text) for text in "abcdefgh"))

        texts = asyncio.run(ask())
        assert all(texts) and len(set(texts)) == 8

    def test_sampling_and_stop(self, endpoint):
        with endpoint.client() as client:

            def ask(**options) -> str:
                answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=30, **options)
                return answer.choices[0].message.content

            greedy, warm = ask(), {"temperature": 2.0, "seed": 5, "top_p": 0.9}
            assert ask(**warm) == ask(**warm) != greedy
            assert ask(stop=greedy[5]) == greedy[: greedy.index(greedy[5])]
            assert ask(logit_bias={str(greedy.encode()[0]): -100}) != greedy
            assert ask(extra_body={"top_k": 1, "temperature": 1.0}) == greedy

    def test_structured_output(self, endpoint):
        schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
                  "additionalProperties": False}  # fmt: skip
        wrapped = {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": schema}}
        with endpoint.client() as client:

            def ask(response_format) -> str:
                answer = client.chat.completions.create(
                    model=MODEL, messages=HELLO, max_tokens=60, response_format=response_format
                )
                return answer.choices[0].message.content

            assert json.loads(ask(wrapped))["x"] in (1, 2)
            assert ask({"type": "json_object"}).startswith("{")
            assert not ask({"type": "text"}).startswith("{")
            with pytest.raises(openai.BadRequestError) as error:
                ask({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}})
            assert error.value.code == "invalid_schema"

    @pytest.mark.parametrize(
        "form",
        [
            {"structured_outputs": {"choice": ["left", "right"]}},
            {"guided_choice": ["left", "right"]},
            {"structured_outputs": {"regex": "left|right"}},
            {"guided_regex": "left|right"},
            {"structured_outputs": {"grammar": 'start: "left" | "right"'}},
            {"guided_json": {"enum": ["left", "right"]}},
            {"structured_outputs": {"json": '{"enum": ["left", "right"]}', "disable_any_whitespace": True}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["left", "right"]}}},
             "compact_json": True},
        ],
        ids=str,
    )  # fmt: skip
    def test_an_answer_has_the_form_that_is_asked_for(self, endpoint, form):
        for body, page in (({"messages": HELLO}, "chat/completions"), ({"prompt": "where?"}, "completions")):
            if page == "completions" and "response_format" in form:
                continue
            status, answer = endpoint.post({**body, **form, "max_tokens": 20}, f"/v1/{page}")
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert (status, text.strip('"')) in ((200, "left"), (200, "right"))

    def test_parts_developer_and_names(self, endpoint):
        with endpoint.client() as client:

            def tokens(messages) -> tuple[int, str]:
                answer = client.chat.completions.create(model=MODEL, messages=messages)
                return answer.usage.prompt_tokens, answer.choices[0].message.content

            parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
            plain = tokens([{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}])
            assert plain == tokens(
                [{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "a"}]
            )
            turns = [*HELLO, {"role": "assistant", "content": None}, *HELLO]
            assert tokens(turns)[0] > plain[0]

    def test_requests_of_both_fronts_are_in_the_metrics(self, endpoint):
        with endpoint.client() as client:
            client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
        status, text = endpoint.get("/metrics")
        assert status == 200
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values['edgellm_requests_total{finish_reason="length"}']) >= 1
        assert float(values["edgellm_generated_tokens_total"]) >= 3
        assert float(values["edgellm_time_to_first_token_seconds_count"]) >= 1
        assert float(values["edgellm_requests_running"]) == 0 and float(values["edgellm_slots"]) == 1
        from prometheus_client.parser import text_string_to_metric_families

        assert {"edgellm_requests", "edgellm_memory_bytes"} <= {
            each.name for each in text_string_to_metric_families(text)
        }
        assert endpoint.get("/health") == (200, '{"status":"ok"}')


BAD_FIELDS = {
    "frobnicate": (1, "The field 'frobnicate' is not supported by this endpoint; leave it out."),
    "n": (2, "n is not supported: one answer is made of each request; send it again for another one."),
    "logprobs": (True, "logprobs is not supported: the backends keep the logits on their device."),
    "frequency_penalty": (0.5, "frequency_penalty is not supported: use repetition_penalty instead."),
    "store": (True, "store is not supported: nothing is stored here."),
    "temperature": ("hot", "temperature is a string, but it must be a number."),
    "min_p": (10**400, f"min_p is 1{'0' * 19}…, which no double can hold."),
    "top_p": (2, "top_p is 2.0, but it must be above 0.0 and at most 1.0."),
    "max_tokens": (0, "max_new_tokens is 0, but it must be from 1 to 2147483647."),
    "seed": (True, "seed is true or false, but it must be a whole number."),
    "stream": (1, "stream is a whole number, but it must be true or false."),
    "stream_options": ({"include_usage": True}, "stream_options is given, but stream is not true."),
    "stop": ([1], "stop is a list of other things than strings."),
    "priority": (256, "The priority is 256, but it must be from 0 to 255."),
    "deadline": (-1, "The deadline is -1.0 s, but it must be 0 (none) or more seconds."),
    "logit_bias": ({"x": 1}, "logit_bias has the key 'x', but its keys must be token ids."),
    "response_format": (
        {"type": "xml"},
        "response_format.type is 'xml', but it must be text, json_object or json_schema.",
    ),
    "structured_outputs": (
        {"choice": ["a"], "regex": "a"},
        "structured_outputs.regex and structured_outputs.choice are given; an answer has one form, give one.",
    ),
    "guided_choice": ([], "guided_choice must be a list of at least one string."),
    "guided_regex": ("[", "The regular expression cannot be used: a pattern does not parse: unclosed character class."),
    "schema_name": ("step", "No schema has the name 'step' in this engine; it has none (schema_dir)."),
    "modalities": (["audio"], "modalities is not supported: answers are text."),
    "messages": ("hi", "messages is a string, but it must be a list."),
    "session": ("a/b", "The session's name is 'a/b', expected 1 to 64 letters, digits, '.', '_' and '-'."),
}


class TestRefusals:
    @pytest.mark.parametrize("field", BAD_FIELDS)
    def test_a_field_is_refused_by_name(self, endpoint, field):
        value, message = BAD_FIELDS[field]
        status, body = endpoint.post({"messages": HELLO, field: value})
        assert (status, body["error"]["message"], body["error"]["type"]) == (400, message, "invalid_request_error")

    def test_a_field_inside_an_object_is_refused_with_its_place(self, endpoint):
        message = {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}
        status, body = endpoint.post({"messages": [*HELLO, message]})
        assert (status, body["error"]["param"]) == (400, "messages[1].content[0]")
        status, body = endpoint.post({"messages": [{"role": "user", "content": "a", "weight": 1}]})
        assert (status, body["error"]["param"]) == (400, "messages[0].weight")

    def test_fields_without_effect_and_nulls_are_accepted(self, endpoint):
        body = {"messages": HELLO, "user": "u", "metadata": {"a": "b"}, "store": False, "n": 1, "logprobs": None,
                "temperature": None, "presence_penalty": 0, "frobnicate": None}  # fmt: skip
        assert endpoint.post(body)[0] == 200

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}', b'{"messages": [1]}', b"{}",
         b'{"messages": []}', b'{"messages": [{"content": "a"}]}', b'{"messages": [{"role": "robot", "content": "a"}]}',
         b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"model": 5}', b'{"max_tokens": 1e5}',
         b'{"temperature": ' + b"9" * 3000 + b"}"],
    )  # fmt: skip
    def test_a_bad_body_is_400_with_one_sentence(self, endpoint, body):
        status, answer = endpoint.post(body)
        error = answer["error"]
        assert status == 400 and error["message"].endswith(".") and "\n" not in error["message"], error
        assert set(error) == {"message", "type", "param", "code"}

    def test_a_field_with_half_a_character_in_its_name_is_refused(self, endpoint):
        for body in ({"messages": HELLO, "\ud800": 1}, {"messages": [HELLO[0] | {"\ud800": 1}]}):
            status, answer = endpoint.post(body)
            assert status == 400 and "ud800" in answer["error"]["param"]

    def test_http_itself(self, endpoint):
        assert endpoint.post({"messages": HELLO}, headers="content-type: text/plain\r\n")[0] == 415
        assert endpoint.post({"messages": HELLO}, path="/v1/embeddings")[0] == 404
        status, text = endpoint.get("/v1/chat/completions")
        assert status == 405 and json.loads(text)["error"]["message"].endswith("GET /v1/chat/completions.")
        assert endpoint.send(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")

    def test_a_prompt_that_is_too_long(self, endpoint):
        status, body = endpoint.post({"messages": [{"role": "user", "content": "x" * 2000}]})
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


class TestLimits:
    def test_values_and_keys(self):
        """The event loop, which all clients share, parses bodies."""
        with pytest.raises(InvalidRequestError, match="about 599999 values, but at most 524288"):
            parse_object(b'{"messages":[' + b"{}," * 299_998 + b"{}]}")
        with pytest.raises(InvalidRequestError, match="an object with the key 'role' twice"):
            parse_object(b'{"messages":[{"role":"user","content":"a","role":"system"}]}')

    def test_bodies(self, serve):
        endpoint = serve(limits=LIMITS)
        gzip = "content-type: application/json\r\ncontent-encoding: gzip\r\n"
        status, body = endpoint.post(b"\x1f\x8b", headers=gzip)
        assert status == 415 and "Content-Encoding" in body["error"]["message"]
        status, body = endpoint.post(b'{"priority":' + b"9" * 5000 + b"}")
        assert status == 400 and body["error"]["message"].endswith("value has 5000 digits.")
        status, body = endpoint.post({"messages": [{"role": "user", "content": "x" * 30_000}]})
        assert (status, body["error"]["code"]) == (413, "body_too_large")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        chunk = b"%x\r\n%s\r\n" % (15_000, b" " * 15_000)
        assert endpoint.send(head + b"transfer-encoding: chunked\r\n\r\n" + 2 * chunk).startswith(b"HTTP/1.1 413")
        assert endpoint.send(head + b"content-length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")
        assert endpoint.send(b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000).startswith(b"HTTP/1.1 4")

    def test_a_client_that_sends_no_headers_is_cut_off(self, serve):
        endpoint = serve(limits=LIMITS)
        for data in (b"", b"GET /health HTTP/1.1\r\nhost:"):
            start = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                assert endpoint.send(data) == b""
            assert time.monotonic() - start < 2.0

    def test_connections_are_limited_and_come_back(self, serve):
        endpoint = serve(limits=dataclasses.replace(LIMITS, header_time=20.0))
        held = [socket.create_connection(endpoint.address) for _ in range(LIMITS.connections)]
        status, body = parse(endpoint.send(b""))
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        for sock in held:
            sock.close()
        eventually(lambda: endpoint.post({"messages": HELLO})[0] == 200)

    def test_a_client_that_does_not_read_is_cancelled(self, serve):
        endpoint = serve(backend={"max_context": 1 << 15}, limits=LIMITS)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(endpoint.address)
            send_chat(sock, {"messages": HELLO, "max_tokens": 30_000, "stream": True})
            eventually(lambda: endpoint.worker.busy)
            eventually(lambda: not endpoint.worker.busy, 30.0)
        assert 'finish_reason="cancelled"} 1.0' in endpoint.get("/metrics")[1]

    def test_slow_clients_leave_the_others_alone(self, serve):
        endpoint = serve(limits=HttpLimits())
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        slow = [socket.create_connection(endpoint.address) for _ in range(64)]
        for sock in slow:
            sock.sendall(head + b"content-length: 900\r\n\r\n{")
        assert endpoint.post({"messages": HELLO})[0] == 200
        for sock in slow:
            sock.close()


def send_chat(sock: socket.socket, fields: dict, more: bytes = b"") -> None:
    """Send a whole chat request over a socket of the test's own, and ``more`` behind it."""
    body = json.dumps(fields).encode()
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s%s" % (len(body), body, more)
    )


def eventually(true, seconds: float = 10.0):
    """Return what ``true`` returns, once that is true."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


SLOW = {"step_time": 0.01}


class TestServing:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_cancels_its_request(self, serve, stream):
        endpoint = serve(backend=SLOW)
        with socket.create_connection(endpoint.address) as sock:
            send_chat(sock, {"messages": HELLO, "max_tokens": 400, "stream": stream})
            eventually(lambda: endpoint.worker.busy)
        eventually(lambda: not endpoint.worker.busy, 1.0)
        assert 'finish_reason="cancelled"} 1.0' in endpoint.get("/metrics")[1]

    @pytest.mark.parametrize("when", ["with it", "later"])
    def test_a_client_that_leaves_after_stray_bytes_cancels_its_request(self, serve, when):
        endpoint = serve(backend=SLOW)
        stray = b"\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\nGET"
        with socket.create_connection(endpoint.address) as sock:
            send_chat(sock, {"messages": HELLO, "max_tokens": 400}, stray if when == "with it" else b"")
            eventually(lambda: endpoint.worker.busy)
            if when == "later":
                sock.sendall(stray)
        eventually(lambda: not endpoint.worker.busy, 1.0)
        assert 'finish_reason="cancelled"} 1.0' in endpoint.get("/metrics")[1]

    def test_requests_sent_at_once_are_answered_one_after_another(self, serve):
        endpoint = serve(backend=SLOW)
        get = b"GET %s HTTP/1.1\r\nhost: x\r\n%s\r\n"
        with socket.create_connection(endpoint.address, timeout=5.0) as sock:
            send_chat(sock, {"messages": HELLO, "max_tokens": 9}, (get % (b"/health", b""))[:9])
            eventually(lambda: endpoint.worker.busy)
            sock.sendall((get % (b"/health", b""))[9:] + get % (b"/v1/models", b"connection: close\r\n"))
            answers = b"".join(iter(lambda: sock.recv(65536), b""))
        assert re.findall(rb"HTTP/1.1 (\d+)|(chat.completion\b|status|list)", answers) == [
            (b"200", b""), (b"", b"chat.completion"), (b"200", b""), (b"", b"status"), (b"200", b""), (b"", b"list"),
        ]  # fmt: skip

    def test_a_client_that_never_reads_holds_no_connection(self, serve):
        endpoint = serve(limits=dataclasses.replace(LIMITS, idle_time=0))
        with socket.create_connection(endpoint.address) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            (protocol,) = eventually(lambda: endpoint.server._server.server_state.connections.copy())
            protocol.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
            sock.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 12)
            eventually(lambda: protocol.transport.get_write_buffer_size() > 0)
            eventually(lambda: not endpoint.server._server.server_state.connections, 3.0)

    def test_no_page_is_a_redirect_to_the_host_that_a_client_names(self, serve):
        head = "GET /v1/models/fake/ HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n"
        for path in ("/health/", "/v1/chat/completions/", "/v1/models/"):
            status, _ = parse(serve().send(head.replace("/v1/models/fake/", path).encode()))
            assert status == 404

    def test_an_event_does_not_wait_for_the_acknowledgement_of_the_one_before(self, serve, monkeypatch):
        made, create = [], socket.create_server

        def listen(*arguments, **options):
            made.append(create(*arguments, **options))
            return made[-1]

        monkeypatch.setattr(socket, "create_server", listen)
        serve()
        assert made and all(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in made)

    def test_every_address_of_a_name_is_listened_on(self, serve, monkeypatch):
        endpoint = serve()

        def named(*addresses):
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: found)

        named("127.0.0.1", "127.0.0.2", "127.0.0.1", "192.0.2.1")  # the last one is no address of this machine
        server = HttpServer(endpoint.intake, host="robot", port=0)
        monkeypatch.undo()
        try:
            for address in ("127.0.0.1", "127.0.0.2"):
                with socket.create_connection((address, server.port), timeout=5.0) as sock:
                    sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                    assert b"200 OK" in sock.recv(65536)
        finally:
            assert server.close()
        named("192.0.2.1")
        with pytest.raises(ConfigurationError, match="cannot listen on robot"):
            HttpServer(endpoint.intake, host="robot", port=0)

    def test_priority_deadline_and_a_full_queue(self, serve):
        endpoint = serve(backend=SLOW)
        with endpoint.client() as client:
            started = time.monotonic()
            late = client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=400, extra_body={"deadline": 0.2}
            )
            assert 0.15 < time.monotonic() - started < 2.0
            assert (late.choices[0].finish_reason, late.edgellm["finish_reason"]) == ("length", "timeout")
            endpoint.worker.update(queue_depth=2)
            order, threads = [], []

            def ask(name, priority, tokens=5):
                client.chat.completions.create(
                    model=MODEL, messages=HELLO, max_tokens=tokens, extra_body={"priority": priority}
                )
                order.append(name)

            def start(*arguments, waiting):
                threads.append(threading.Thread(target=ask, args=arguments))
                threads[-1].start()
                eventually(lambda: endpoint.worker.busy and endpoint.worker.queued == waiting)

            start("first", 0, 60, waiting=0)
            start("low", 1, waiting=1)
            start("high", 9, waiting=2)
            with pytest.raises(openai.RateLimitError, match="queue_depth is 2"):
                client.chat.completions.create(model=MODEL, messages=HELLO)
            for thread in threads:
                thread.join()
        assert order == ["first", "high", "low"]

    def test_what_ends_a_request_at_the_robot_is_an_error_not_to_be_retried(self, serve):
        endpoint = serve(backend=SLOW)
        with endpoint.client() as client:
            thread = threading.Thread(
                target=lambda: (eventually(lambda: endpoint.worker.busy), endpoint.intake.cancel(""))
            )
            thread.start()
            with pytest.raises(openai.InternalServerError) as error:
                client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=400)
            thread.join()
            assert (error.value.status_code, error.value.code) == (503, "cancelled")
            assert error.value.response.headers["x-should-retry"] == "false"
            stream = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=400, stream=True)
            next(stream)
            endpoint.intake.cancel("")
            with pytest.raises(openai.APIError, match="cancelled"):
                list(stream)

    def test_a_fault_of_the_engine(self, serve):
        endpoint = serve(backend={"fail_at": 3})
        status, body = endpoint.post({"messages": HELLO})
        assert (status, body["error"]["code"]) == (503, "engine_fault")
        status, body = endpoint.post({"messages": HELLO})
        assert (status, body["error"]["code"]) == (503, "not_active")
        endpoint.state.worker = None
        assert endpoint.post({"messages": HELLO})[0] == 503
        assert endpoint.get("/health") == (503, '{"status":"inactive"}')

    def test_defaults_are_those_of_the_node(self, serve):
        settings = RequestDefaults(SamplingParams(max_new_tokens=3), stop=("zzz",), system_prompt="Be brief.")
        endpoint = serve(settings=settings)
        _, body = endpoint.post({"messages": HELLO})
        _, explicit = endpoint.post({"messages": [{"role": "system", "content": "Be brief."}, *HELLO]})
        assert body["usage"]["completion_tokens"] == 3
        assert body["usage"]["prompt_tokens"] == explicit["usage"]["prompt_tokens"] > 20

    def test_sessions(self, serve):
        endpoint = serve()
        for turns in (1, 2):
            status, body = endpoint.post({"messages": HELLO, "session": "a", "max_tokens": 3})
            assert (status, body["edgellm"]["session_turns"]) == (200, turns)

    def test_keys(self, serve, tmp_path):
        path = tmp_path / "keys"
        path.write_text("# of the planner\nsecret-1\n\nsecret-2\nclé-à\n", encoding="utf-8")
        endpoint = serve(api_key_file=str(path))
        for key in ("secret-1", "secret-2"):
            with endpoint.client(key) as client:
                assert client.models.list().data
        head = "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer clé-à\r\n\r\n"
        assert parse(endpoint.send(head.encode()))[0] == 200
        with endpoint.client("secret") as client, pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert endpoint.get("/metrics")[0] == 401 and endpoint.get("/health")[0] == 200

    def test_it_is_closed_while_clients_are_connected(self, serve):
        endpoint = serve(backend=SLOW)
        idle = socket.create_connection(endpoint.address)
        start = time.monotonic()
        assert endpoint.worker.close() and endpoint.server.close()
        assert time.monotonic() - start < 2.5
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(endpoint.address)
        idle.close()


def test_why_it_cannot_be_opened(serve, tmp_path, monkeypatch):
    endpoint = serve()
    with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1, port {endpoint.server.port}: .*in use"):
        HttpServer(endpoint.intake, port=endpoint.server.port)
    with pytest.raises(ConfigurationError, match="cannot listen on no.such.host.invalid"):
        http.open_server(endpoint.intake, host="no.such.host.invalid", port=0)
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        http.open_server(endpoint.intake, host="127.0.0.1", port=0, api_key_file=str(tmp_path / "none"))
    for port in (-1, 65536, 70000):
        with pytest.raises(ConfigurationError, match=f"is {port}, but it must be from 0 to 65535"):
            http.open_server(endpoint.intake, host="127.0.0.1", port=port)
    for path, why in (("~no-such-user/keys", "names a home directory"), ("a\0b", "cannot be read")):
        with pytest.raises(ConfigurationError, match=why):
            read_keys(path)
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigurationError, match="has no key"):
        read_keys(str(tmp_path / "empty"))
    monkeypatch.setitem(__import__("sys").modules, "engine_core.http.server", None)
    with pytest.raises(ConfigurationError, match="needs the Python package"):
        http.open_server(endpoint.intake, host="127.0.0.1", port=0)


SERVE = """
import sys
sys.path[:0] = {paths!r}
from engine_core import cli
from engine_core.backends import registry
options = cli.make_parser().parse_args(["serve", {engine!r}, "--port", "0", "--max-new-tokens", "6"])
registry.BACKENDS["fake"] = ("fake_backend", "FakeBackend")  # after what can be chosen has been written down
sys.exit(options.run(options))
"""


def test_the_command_serves_without_ros(tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "ros"), str(here.parents[1])]
    sys.path.append(paths[1])
    from fake_backend import write_engine

    engine = write_engine(tmp_path / "engine")
    program = SERVE.format(paths=paths, engine=str(engine))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        line = process.stdout.readline()
        url = re.match(r"OpenAI's API is served at (http://127\.0\.0\.1:\d+/v1), ", line)[1]
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
            answer = client.chat.completions.create(model=MODEL, messages=HELLO)
        assert answer.usage.completion_tokens == 6
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0 and "Memory plan" in errors and "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
