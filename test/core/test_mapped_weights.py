"""The weights of a loaded engine are its own: what happens to the file later changes no answer and ends nothing."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import vocab_checkpoints
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.mapped_weights import copy_mapped, held_still
from engine_core.errors import EngineDirectoryError
from engine_core.formats.vocab_map import write_vocab_map

ROOT = Path(__file__).resolve().parents[2]
ANSWER_BEFORE_AND_AFTER = """
import os, sys
from engine_core.config import EngineConfig
from engine_core.request import GenerationRequest, SamplingParams
from engine_core.serving.engine import CancelToken, Engine


def answer(engine):
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    prepared = engine.prepare(GenerationRequest("r", prompt="Where is the red cup?", sampling=sampling))
    return [piece.token_ids for piece in engine.generate(prepared, CancelToken())]


for directory, vocab_map in zip(sys.argv[1::2], sys.argv[2::2]):
    engine = Engine.open(EngineConfig(directory, vocab_map=vocab_map, num_threads=1, prompt_cache_entries=0))
    data = os.path.join(directory, "model.onnx.data")
    answers = [answer(engine)]
    with open(data, "r+b") as file:
        file.write(os.urandom(os.path.getsize(data)))
    answers.append(answer(engine))
    os.truncate(data, 0)
    answers.append(answer(engine))
    os.remove(data)
    answers.append(answer(engine))
    assert answers[0] and all(other == answers[0] for other in answers), (directory, answers)
    engine.close()
"""


def test_answers_stay_the_same_when_the_file_changes_shrinks_and_vanishes(tmp_path):
    checkpoint = vocab_checkpoints.write_checkpoint(tmp_path / "checkpoint", "byte_level", tied=False)
    arguments = []
    for name, quantization in (("fp32", "fp32"), ("int8", "int8"), ("cut at load", "fp32")):
        manifest = build_engine(checkpoint, tmp_path / name, quantization=quantization)
        arguments += [tmp_path / name, "auto"]
    kept = np.union1d(np.arange(300), manifest.eos_token_ids).astype(np.int32)
    write_vocab_map(tmp_path / "map", kept, {})
    arguments[-1] = tmp_path / "map"
    command = [sys.executable, "-c", ANSWER_BEFORE_AND_AFTER, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def test_a_copy_has_the_address_and_the_bytes_of_the_mapping(tmp_path):
    path = tmp_path / "data"
    content = os.urandom(3 * mmap.PAGESIZE + 5)
    path.write_bytes(content)
    mapping = mapped(path)
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    with held_still(path) as fd:
        assert copy_mapped(path, fd) == 4 * mmap.PAGESIZE
        assert copy_mapped(path, fd) == 0  # none is left
    os.truncate(path, 0)
    assert mapping[:] == content and np.frombuffer(mapping, np.uint8).ctypes.data == address


def test_a_file_that_is_shorter_than_its_mapping_is_told(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"x" * 2 * mmap.PAGESIZE)
    mapping = mapped(path)
    with open(path, "r+b") as writer, pytest.raises(EngineDirectoryError), held_still(path) as fd:  # no lease
        writer.truncate(100)
        copy_mapped(path, fd)
    assert mapping[:100] == b"x" * 100


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(b"longer"), Path.unlink, lambda p: os.utime(p, (1, 1))])
def test_a_change_that_nothing_held_up_is_told(tmp_path, change):
    path = tmp_path / "data"
    path.write_bytes(b"data")
    with open(path, "r+b"), pytest.raises(EngineDirectoryError, match="changed"), held_still(path):
        change(path)


def test_a_writer_waits_until_the_file_is_loaded(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"data")
    with held_still(path):
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        writer = subprocess.Popen([sys.executable, "-c", f"open({str(path)!r}, 'wb').write(b'changed')"])
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(1.0)
        assert path.read_bytes() == b"data"
    assert writer.wait(30) == 0 and path.read_bytes() == b"changed"


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(EngineDirectoryError, match="cannot be read"), held_still(tmp_path / "data"):
        pass
