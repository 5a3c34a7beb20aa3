"""Both TensorRT exporters against transformers, on every architecture: prefill, token by token, in chunks."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import onnx

import checkpoints
from engine_core.backends.tensorrt.export import export_onnx
from engine_core.errors import BuildError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.weights import Weights
from engine_core.models.reader import read_spec
from peak_memory import growth, large_checkpoint
from trt_runners import NativeRunner, PlainRunner

MAX_ERROR = 1e-4
PROMPT = np.random.default_rng(3).integers(3, 331, size=45)  # longer than every window, shorter than longrope's switch
MAX_CONTEXT = 64
OPSET_24 = onnx.defs.onnx_opset_version() >= 24


def export(directory, out, *, exporter="plain", dtype="fp32", vocab_map=None):
    out.mkdir(exist_ok=True)
    checkpoint = Checkpoint(directory)
    weights = Weights(checkpoint, read_spec(checkpoint), vocab_map)
    return export_onnx(out, weights, MAX_CONTEXT, exporter=exporter, dtype=dtype), weights.spec


@pytest.fixture(scope="module", params=checkpoints.ALL_ATTENTION)
def checkpoint(request, tmp_path_factory):
    """(directory, transformers' logits of PROMPT after each token, float32 [n, vocab])."""
    directory = checkpoints.write(tmp_path_factory.mktemp(request.param), request.param)
    return directory, checkpoints.reference_logits(checkpoints.reference(directory), PROMPT)


@pytest.fixture(scope="module")
def plain(checkpoint):
    directory, expected = checkpoint
    model, spec = export(directory, directory / "plain")
    return PlainRunner(model, spec, MAX_CONTEXT), expected


def test_plain_prefill_has_the_logits_of_transformers(plain):
    runner, expected = plain
    for length in (1, 2, 17, len(PROMPT)):
        assert np.abs(runner.run(PROMPT[:length], 0) - expected[length - 1]).max() < MAX_ERROR, length


def test_plain_token_by_token_has_the_logits_of_transformers(plain):
    runner, expected = plain
    runner.cache[:] = -1000
    for position in range(len(PROMPT)):
        logits = runner.run(PROMPT[position : position + 1], position)
        assert np.abs(logits - expected[position]).max() < MAX_ERROR, position


def test_plain_chunks_of_any_past_and_padding_have_the_logits_of_transformers(plain):
    runner, expected = plain
    for start in range(0, len(PROMPT), 7):
        chunk = PROMPT[start : start + 7]
        # A past of 16 positions at the start: nothing of it is seen. Then the shortest that covers what is.
        logits = runner.run(chunk, start, past=max(16, -(-start // 16) * 16), padding=start % 3)
        assert np.abs(logits - expected[start + len(chunk) - 1]).max() < MAX_ERROR, start


def test_plain_reads_the_caches_without_copies(checkpoint, plain):
    """The only node a past key meets before its product is the transposition the builder folds into it."""
    model = onnx.load(str(checkpoint[0] / "plain" / "model.onnx"), load_external_data=False)
    consumers = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    pasts = [value.name for value in model.graph.input if value.name.startswith("past_") and "." in value.name]
    assert len(pasts) == 2 * 3
    for name in pasts:
        (node,) = consumers[name]
        if "key" in name:
            assert node.op_type == "Transpose" and node.name.endswith("/transposed")
            (node,) = consumers[node.output[0]]
        assert node.op_type == "MatMul"
    onnx.checker.check_model(str(checkpoint[0] / "plain" / "model.onnx"))
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]


def test_plain_in_fp16_is_near_transformers(checkpoint, tmp_path):
    directory, expected = checkpoint
    model, spec = export(directory, tmp_path, dtype="fp16")
    runner = PlainRunner(model, spec, MAX_CONTEXT, np.float16)
    spread = expected.std()
    logits = runner.run(PROMPT[:30], 0)
    assert np.abs(logits - expected[29]).max() < 0.02 * spread
    for position in range(30, len(PROMPT)):
        logits = runner.run(PROMPT[position : position + 1], position)
        assert np.abs(logits - expected[position]).max() < 0.02 * spread, position


@pytest.mark.skipif(not OPSET_24, reason="this onnx has no opset 24")
def test_native_has_the_logits_of_transformers(checkpoint):
    directory, expected = checkpoint
    model, spec = export(directory, directory / "native", exporter="native")
    onnx.checker.check_model(str(model))
    runner = NativeRunner(model, spec, MAX_CONTEXT)
    for start, stop in ((0, 17), (17, 40), *((i, i + 1) for i in range(40, len(PROMPT)))):
        logits = runner.run(PROMPT[start:stop], start)
        assert np.abs(logits - expected[stop - 1]).max() < MAX_ERROR, (start, stop)


@pytest.mark.skipif(not OPSET_24, reason="this onnx has no opset 24")
def test_native_in_fp16_is_near_transformers(checkpoint, tmp_path):
    directory, expected = checkpoint
    model, spec = export(directory, tmp_path, exporter="native", dtype="fp16")
    runner = NativeRunner(model, spec, MAX_CONTEXT, np.float16)
    logits = runner.run(PROMPT[:40], 0)
    assert np.abs(logits - expected[39]).max() < 0.02 * expected.std()
    logits = runner.run(PROMPT[40:41], 40)
    assert np.abs(logits - expected[40]).max() < 0.02 * expected.std()


def test_a_smaller_head_has_the_rows_of_its_vocab_map(checkpoint, tmp_path):
    directory, expected = checkpoint
    kept = np.arange(2, 331, 7).astype(np.int32)
    model, spec = export(directory, tmp_path, vocab_map=kept)
    logits = PlainRunner(model, spec, MAX_CONTEXT).run(PROMPT[:9], 0)
    assert logits.shape == kept.shape
    assert np.abs(logits - expected[8][kept]).max() < MAX_ERROR


def test_a_weight_fp16_cannot_hold_is_refused(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    directory = checkpoints.write(tmp_path / "checkpoint", "llama3")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.tensor(7e4)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(BuildError, match="fp16"):
        export(directory, tmp_path / "out", dtype="fp16")
    export(directory, tmp_path / "out", dtype="fp32")


IMPORTS = """
from engine_core.formats.checkpoint import Checkpoint
from engine_core.models.reader import read_spec
from engine_core.backends.tensorrt.export import export_onnx
from engine_core.formats.weights import Weights
"""
EXPORT = """
checkpoint = Checkpoint(Path(sys.argv[1]))
out = Path(sys.argv[2])
out.mkdir()
export_onnx(out, Weights(checkpoint, read_spec(checkpoint)), 256, exporter=sys.argv[3], dtype="fp16")
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return large_checkpoint(tmp_path_factory.mktemp("large") / "checkpoint")


@pytest.mark.parametrize("exporter", ["plain", "native"])
def test_an_export_takes_less_memory_than_one_and_a_half_checkpoints(large, tmp_path, exporter):
    directory, size = large
    found = growth(IMPORTS, EXPORT, directory, tmp_path / "out", exporter)
    # The checkpoint is mapped, so its own pages count once they are read; a copy in float32 would be 2 more of it.
    print(f"{found / size:.2f} checkpoints of {size / 1e6:.0f} MB")
    assert found < 1.5 * size, f"{found / size:.2f} checkpoints"
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > size - 1e6
