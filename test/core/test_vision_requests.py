"""Images of requests: how many, where they stand, and a model that does not see them."""

import numpy as np
import pytest

from engine_core.errors import InvalidImageError
from engine_core.request import ChatMessage, GenerationRequest, RequestLimits
from engine_core.vision import Image

IMAGE = Image(np.zeros((2, 2, 3), np.uint8))


def ask(*messages: ChatMessage, images: int = 1, **fields) -> GenerationRequest:
    return GenerationRequest("r", messages or (ChatMessage("user", "cup?"),), images=(IMAGE,) * images, **fields)


@pytest.mark.parametrize(
    "request_",
    [
        ask(),
        ask(ChatMessage("user", "cup?", images=(0, 4)), images=2),
        ask(ChatMessage("user", "cup?", images=(4,)), ChatMessage("user", "", images=(0, 0)), images=3),
        ask(ChatMessage("user", "")),
    ],
)
def test_images_stand_in_the_messages_of_users(request_):
    request_.validate()


@pytest.mark.parametrize(
    "request_, words",
    [
        (ask(images=65), "65 images, but at most 64"),
        (ask(ChatMessage("user", "cup?", images=(0,) * 70)), "70 images, but at most 64"),
        (ask(ChatMessage("user", "cup?", images=(5,))), "at [5], but places ascend from 0 to the 4 characters"),
        (ask(ChatMessage("user", "cup?", images=(3, 1)), images=2), "at [3, 1], but places ascend from 0"),
        (ask(ChatMessage("user", "cup?", images=(-1,))), "at [-1], but places ascend from 0"),
        (ask(ChatMessage("user", "cup?", images=(0, 1))), "places for 2 images, but the request has 1"),
        (ask(ChatMessage("user", "cup?", images=(0,)), images=0), "places for 1 images, but the request has 0"),
        (ask(ChatMessage("user", "cup?"), ChatMessage("assistant", "", images=(0,))), "role assistant has images"),
        (ask(ChatMessage("system", "You see."), ChatMessage("assistant", "Yes.")), "no user's message"),
    ],
)
def test_other_images_are_refused(request_, words):
    with pytest.raises(InvalidImageError) as refused:
        request_.validate()
    assert words in str(refused.value)


def test_the_bytes_of_all_images_are_limited():
    with pytest.raises(InvalidImageError, match="24 bytes of images, but at most 23 are accepted"):
        ask(images=2).validate(RequestLimits(image_bytes=23))


def test_the_edges_of_an_image_are_limited():
    with pytest.raises(InvalidImageError, match="but an edge may have at most 1 pixels"):
        ask(images=1).validate(RequestLimits(image_edge=1))


def test_a_model_without_eyes_refuses_images(open_engine):
    with pytest.raises(InvalidImageError, match="takes no images; load a vision-language model"):
        open_engine().prepare(ask())
