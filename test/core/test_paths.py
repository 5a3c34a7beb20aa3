"""A ~ in a path stands for a home directory that is there, or one sentence says that it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError
from engine_core.formats.lora import adapter_paths
from engine_core.formats.signatures import read_trusted_keys
from engine_core.paths import expand_user

UNKNOWN = ["~0", "~nobody-of-that-name", "~nobody-of-that-name/x", "~\udcff/x"]


def test_a_home_directory_takes_the_place_of_a_tilde_at_the_beginning(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    assert expand_user("~/x") == expand_user(Path("~/x")) == Path("/home/anna/x")
    assert expand_user("~") == Path("/home/anna")
    assert expand_user("a/~0") == Path("a/~0")


@pytest.mark.parametrize("path", UNKNOWN)
@pytest.mark.parametrize(
    "read",
    [
        expand_user,
        lambda path: EngineConfig(path),
        lambda path: EngineConfig.from_dict({"engine_dir": path}),  # the parameter of a node
        read_trusted_keys,
        lambda path: adapter_paths([f"a:{path}"]),
    ],
    ids=["path", "engine_dir", "parameter", "trusted_keys", "lora_adapters"],
)
def test_a_home_directory_that_is_not_there_is_told(read, path):
    with pytest.raises(ConfigurationError, match="names a home directory that this machine does not know") as found:
        read(path)
    assert "\n" not in str(found.value) and str(found.value).isprintable()


@pytest.mark.parametrize("path", UNKNOWN)
def test_a_home_directory_of_the_api_keys_that_is_not_there_is_told(path):
    pytest.importorskip("uvicorn")
    from engine_core.http.server import read_keys

    with pytest.raises(ConfigurationError, match="names a home directory"):
        read_keys(path)
