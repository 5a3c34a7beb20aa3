from __future__ import annotations

import pytest

import fakes
from fake_gpu import FakeDriver, install


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    fakes.write_tokenizer(directory)
    return directory


@pytest.fixture
def driver(monkeypatch):
    """The CUDA driver in host memory on which the test opens every ``Device``."""
    driver = FakeDriver()
    install(monkeypatch, driver)
    return driver


@pytest.fixture
def open_engine(tokenizer_dir):
    """Makes engines on a ScriptedBackend and closes them."""
    engines = []

    def make(script=None, *, config=None, **backend):
        engines.append(fakes.make_engine(fakes.ScriptedBackend(script, **backend), tokenizer_dir, **(config or {})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
