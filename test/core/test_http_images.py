"""Images in requests of OpenAI's API: data URLs in the parts of a user's message."""

import base64
import io
import socket

import numpy as np
import pytest
from PIL import Image as PillowImage

pytest.importorskip("uvicorn")

import fakes  # noqa: E402
from engine_core.errors import InvalidImageError  # noqa: E402
from engine_core.http.fields import FieldError, Fields  # noqa: E402
from engine_core.http.limits import HttpLimits  # noqa: E402
from engine_core.http.openai_requests import chat_request  # noqa: E402
from engine_core.request import RequestDefaults  # noqa: E402
from http_endpoint import Endpoint  # noqa: E402


def data_url(level: int) -> str:
    file = io.BytesIO()
    PillowImage.new("RGB", (3, 2), (level, 0, 0)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image(url: str, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(text: str) -> dict:
    return {"type": "text", "text": text}


def read(*messages: dict):
    return chat_request(Fields({"messages": list(messages)}), RequestDefaults(), {"fake": ""})


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def endpoint(tokenizer_dir):
    engine = fakes.make_engine(fakes.ScriptedBackend(max_context=1024), tokenizer_dir)
    endpoint = Endpoint(engine, limits=HttpLimits(all_body_bytes=30_000, body_bytes=60_000))
    yield endpoint
    endpoint.close()
    engine.close()


def test_images_stand_where_their_parts_do():
    asked = read(
        user(image(data_url(1), detail="low"), text("Which is redder, this "), image(data_url(2)), text("?")),
        {"role": "assistant", "content": "The second."},
        user(text("And this?"), {"type": "image_url", "image_url": data_url(3)}),
    )
    first, _, last = asked.request.messages
    assert (first.content, first.images) == ("Which is redder, this ?", (0, 22))
    assert (last.content, last.images) == ("And this?", (9,))
    filled = asked.images.read_images(asked.request)
    filled.validate()
    assert [each.pixels[0, 0, 0] for each in filled.images] == [1, 2, 3]
    assert filled.images[0].pixels.shape == (2, 3, 3) and filled.images[0].pixels.dtype == np.uint8


def test_only_users_have_images():
    with pytest.raises(FieldError, match="of type 'image_url', but only text is accepted here") as refused:
        read({"role": "system", "content": [image(data_url(1))]})
    assert refused.value.param == "messages[0].content[0]"
    with pytest.raises(FieldError, match="'input_audio', but only text and image_url is accepted"):
        read(user({"type": "input_audio"}))
    with pytest.raises(FieldError, match="has no URL of an image"):
        read(user({"type": "image_url", "image_url": {}}))


def test_images_are_limited():
    with pytest.raises(InvalidImageError, match="65 images, but at most 64"):
        read(user(*[image("data:")] * 65))


@pytest.mark.parametrize(
    "url, words",
    [("http://127.0.0.1:9/cat.png", "nothing is fetched"), ("data:image/png;base64,AAAA", "no JPEG or PNG file")],
)
def test_a_bad_image_is_refused(url, words):
    asked = read(user(image(url), text("?")))
    with pytest.raises(InvalidImageError, match=words):
        asked.images.read_images(asked.request)


def test_a_model_without_eyes_answers_400(endpoint):
    status, body = endpoint.post({"messages": [user(image(data_url(1)), text("?"))]})
    assert (status, body["error"]["code"]) == (400, "invalid_image") and "takes no images" in body["error"]["message"]


def test_all_bodies_together_are_limited(endpoint):
    """One is taken whatever its size is, up to the limit of one."""
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 40000\r\n\r\n"
    head = head.replace(b"/ ", b"/v1/chat/completions ", 1)
    with socket.create_connection(endpoint.address, timeout=5.0) as waiting:
        waiting.sendall(head + b" " * 20_000)
        for _ in range(50):  # until the endpoint has read that
            status, body = endpoint.post(b" " * 40_000)
            if status == 503:
                break
        assert body["error"]["code"] == "too_many_bodies"
    status, body = endpoint.post(b" " * 40_000 + b"{}")
    assert (status, body["error"]["code"]) == (400, "empty_prompt")
