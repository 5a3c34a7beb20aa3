"""The page of the HTTP endpoint and its figures, as bytes and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import zlib
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

import fakes  # noqa: E402
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams  # noqa: E402
from http_endpoint import Endpoint  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "<img src=x onerror=alert(1)>"
KEY = "correct-horse"


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def request(name: str, text: str = "hello", count: int = 200) -> GenerationRequest:
    return GenerationRequest(name, (ChatMessage("user", text),), sampling=SamplingParams(max_new_tokens=count))


@pytest.fixture(scope="module")
def endpoint(tokenizer_dir, tmp_path_factory):
    """One request runs, one waits, one has ended and one was refused."""
    engine = fakes.make_engine(fakes.ScriptedBackend(max_context=1024, step_time=0.05), tokenizer_dir)
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    endpoint = Endpoint(engine, api_key_file=str(keys))
    done = []
    endpoint.intake.take(request("first", count=3), on_done=done.append)
    endpoint.intake.take(request("x" * 9, text=""), on_done=done.append)
    wait_until(lambda: len(done) == 2)
    opened = [endpoint.intake.take(request(name), on_done=done.append) for name in (NASTY, "waiting one")]
    wait_until(lambda: endpoint.worker.busy)
    yield endpoint
    for each in opened:
        each.cancel()
    endpoint.close()
    engine.close()


def get(endpoint, path, key="") -> tuple[int, str, str]:
    head = f"authorization: Bearer {key}\r\n" if key else ""
    answer = endpoint.send(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\n".encode())
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


class TestStatus:
    def test_the_figures_need_the_key_and_the_page_does_not(self, endpoint):
        assert get(endpoint, "/status")[0] == get(endpoint, "/status", "wrong")[0] == 401
        status, head, body = get(endpoint, "/")
        assert status == 200 and "text/html" in head and "default-src 'none'" in head
        assert KEY not in body and "fake" not in body

    def test_the_figures_are_those_of_the_engine(self, endpoint):
        found = json.loads(get(endpoint, "/status", KEY)[2])
        engine = endpoint.state.engine
        assert (found["state"], found["model_name"], found["max_context"]) == ("active", "fake", 1024)
        assert found["memory_total"] == engine.plan.total == sum(found["memory"].values())
        assert [(each["request_id"], each["running"]) for each in found["requests"]] == [
            (NASTY, True), ("waiting one", False),
        ]  # fmt: skip
        assert (found["busy"], found["queued"], found["requests_total"]) == (True, 1, 2)
        assert found["tokens_total"] == 3 + found["requests"][0]["generated_tokens"]
        assert len(found["answers"]) == 1 and found["answers"][0]["wait"] >= 0
        (error,) = found["errors"]
        assert error["request_id"] == "xxxxxxxxx" and error["message"] and error["age"] >= 0

    def test_nothing_is_fetched_from_elsewhere(self, endpoint):
        body = get(endpoint, "/")[2]
        assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]*\"|url\(|@import", body)
        assert set(re.findall(r"https?://[^\"' ]+", body)) == {"http://www.w3.org/2000/svg"}
        assert "innerHTML" not in body and "document.write" not in body


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Return the DOM of a page after two seconds of its time, or write a picture of it."""
    if BROWSER is None:
        pytest.skip("chromium is not installed")
    home = tmp_path_factory.mktemp("browser")

    def browse(url: str, *options: str) -> str:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += [f"--user-data-dir={home}", "--virtual-time-budget=2500", *options, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return browse


def background(picture: Path) -> int:
    """The red of the first pixel of a PNG, whose row may be filtered in any way: nothing stands before it."""
    data, parts, place = picture.read_bytes(), b"", 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        parts += data[place + 8 : place + 8 + size] if data[place + 4 : place + 8] == b"IDAT" else b""
        place += size + 12
    return zlib.decompress(parts)[1]


class TestInABrowser:
    def test_the_page_shows_the_figures_and_no_markup_of_clients(self, endpoint, open_url, browse):
        dom = browse(open_url, "--dump-dom")
        assert re.search(r'id="state" class="state active">active<', dom), dom[-4000:]
        assert 'id="model">fake<' in dom and "Requests: 1 running, 1 waiting" in dom
        assert "<img" not in dom and "&lt;img src=x" in dom and "<td>waiting</td>" in dom
        assert "xxxxxxxxx: " in dom and 'class="area"' in dom

    def test_it_asks_for_a_key_where_one_is_needed(self, endpoint, browse):
        dom = browse(endpoint.server.url, "--dump-dom")
        assert ">locked<" in dom and re.search(r'id="ask" class="wide">', dom) and "waiting one" not in dom

    def test_light_and_dark(self, endpoint, browse, tmp_path):
        reds = []
        for name, scheme in (("light", 1), ("dark", 0)):
            picture = tmp_path / f"{name}.png"
            browse(
                endpoint.server.url, f"--screenshot={picture}", "--window-size=300,200",
                f"--blink-settings=preferredColorScheme={scheme}",
            )  # fmt: skip
            reds.append(background(picture))
        assert reds[0] > 200 and reds[1] < 60


@pytest.fixture(scope="module")
def open_url(endpoint):
    """The same intake behind an endpoint that asks for no key."""
    from engine_core.http.server import HttpServer

    watch = endpoint.intake.watch
    server = HttpServer(endpoint.intake, port=0)
    server_watch = endpoint.intake.watch

    def both(result):
        watch(result)
        server_watch(result)

    endpoint.intake.watch = both
    endpoint.intake.refuse("xxxxxxxxx", ValueError("nothing to say"))
    yield server.url
    assert server.close()
