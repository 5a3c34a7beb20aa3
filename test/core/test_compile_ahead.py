"""Kernels compiled ahead, on the fake driver: side by side, once, and with their errors."""

from __future__ import annotations

import threading

import pytest

import engine_core.cuda.kernels
from engine_core.cuda.driver import Device, KernelCompileError
from engine_core.cuda.kernels import Kernels
from fake_gpu import FakeDriver, compile_kernel, install


@pytest.fixture
def compiled(monkeypatch):
    """The COLS of what is compiled, in order."""
    install(monkeypatch, FakeDriver())
    order: list[int] = []

    def note(source: str, **kwargs) -> bytes:
        order.append(kwargs["defines"]["COLS"])
        return compile_kernel(source, **kwargs)

    monkeypatch.setattr(engine_core.cuda.kernels, "compile_kernel", note)
    return order


@pytest.fixture
def kernels(compiled):
    kernels = Kernels(Device(), "fp16")
    yield kernels
    kernels.close()


def _ask(kernels: Kernels, *columns: int) -> list:
    return [kernels.function("elementwise", "embed", {"COLS": cols}) for cols in columns]


def test_what_is_asked_for_is_compiled_once_and_found_later(kernels, compiled):
    kernels.compile_ahead(lambda: _ask(kernels, 8, 16, 8))
    assert sorted(compiled) == [8, 16]
    assert None not in _ask(kernels, 8, 16)
    kernels.compile_ahead(lambda: _ask(kernels, 16, 24))
    assert sorted(compiled) == [8, 16, 24]


def test_two_are_compiled_at_the_same_time(kernels, monkeypatch):
    both = threading.Barrier(2)

    def wait_for_the_other(source: str, **kwargs) -> bytes:
        both.wait(timeout=20)
        return compile_kernel(source, **kwargs)

    monkeypatch.setattr(engine_core.cuda.kernels, "compile_kernel", wait_for_the_other)
    monkeypatch.setattr(engine_core.cuda.kernels.os, "cpu_count", lambda: 2)
    kernels.compile_ahead(lambda: _ask(kernels, 8, 16))


def test_an_error_comes_out_and_the_next_attempt_starts_anew(kernels, compiled, monkeypatch):
    def refuse(source: str, **kwargs) -> bytes:
        raise KernelCompileError("no")

    with monkeypatch.context() as context:
        context.setattr(engine_core.cuda.kernels, "compile_kernel", refuse)
        with pytest.raises(KernelCompileError, match="no"):
            kernels.compile_ahead(lambda: _ask(kernels, 8))
    with pytest.raises(ZeroDivisionError):
        kernels.compile_ahead(lambda: 1 / 0)
    assert None not in _ask(kernels, 8)
    assert compiled == [8]


def test_a_function_is_prepared_once(kernels):
    driver = kernels.device._driver
    (first,) = _ask(kernels, 8)
    calls = driver.log.count("cuFuncSetAttribute")
    assert _ask(kernels, 8) == [first]
    assert driver.log.count("cuFuncSetAttribute") == calls
