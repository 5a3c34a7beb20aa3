"""Chunks of a prompt that are too long for a CUDA graph: who gets them, and that they change no token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine_core.backends.cuda.backend import MAX_GRAPH_ROWS, CudaBackend
from engine_core.backends.cuda.layout import (
    LARGE_CHUNK,
    LARGE_CHUNK_SMS,
    PREFILL_CHUNK,
    CudaSpec,
    planned_bytes,
    weight_arrays,
)
from engine_core.backends.gpu_model import DeviceModel
from engine_core.cuda.driver import Device
from engine_core.cuda.kernels.attention import AttentionShape
from engine_core.formats.weight_formats import weight_format
from engine_core.measure.steps import begin, decode, prefill
from engine_core.models.shapes import spec_of
from engine_core.request import SamplingParams
from fake_gpu import FakeDriver, install

CONTEXT = 704
MODEL = dict(
    architectures=["LlamaForCausalLM"],
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    rms_norm_eps=1e-5,
)


def _spec(**changes) -> CudaSpec:
    spec = CudaSpec(
        model=spec_of(MODEL),
        head_rows=64,
        dtype="fp16",
        kv_int8=False,
        max_context=8192,
        weight_format=weight_format("int4"),
        chunk=PREFILL_CHUNK,
        pool_tokens=0,
        chooses_chunk=True,
    )
    return dataclasses.replace(spec, **changes)


def test_a_gpu_of_many_sms_gets_long_chunks_and_plans_them():
    spec = _spec()
    assert spec.with_sms(LARGE_CHUNK_SMS).chunk == LARGE_CHUNK
    assert spec.with_sms(LARGE_CHUNK_SMS - 1).chunk == PREFILL_CHUNK
    assert _spec(max_context=1000, chunk=512).with_sms(132).chunk == 1024
    assert _spec(chooses_chunk=False).with_sms(132).chunk == PREFILL_CHUNK  # a parameter says so
    assert _spec(max_batch=2).with_sms(132).chunk == PREFILL_CHUNK  # others wait for a chunk
    more = planned_bytes(spec, 132)["scratch"] - planned_bytes(_spec(chooses_chunk=False), 132)["scratch"]
    # Of each row: hidden in float32; normed, qkv, attended, gate and up, activated in 16 bits.
    assert more == (LARGE_CHUNK - PREFILL_CHUNK) * (64 * 4 + 2 * (64 + 128 + 64 + 192 + 96))


def test_long_chunks_share_configurations_of_attention():
    shape = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, max_context=8192)
    assert [shape.prefill_problem(rows).rows for rows in (32, 512, 576, 768, 832, 2048)] == [
        *(32, 512, 768, 768, 1024, 2048)
    ]


@pytest.fixture
def load(monkeypatch, tmp_path):
    install(monkeypatch, FakeDriver(memory=1 << 28))
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    loaded = []

    def make(chunk: int) -> CudaBackend:
        spec = _spec(chunk=chunk, max_context=CONTEXT, weight_format=weight_format("fp16"), chooses_chunk=False)
        random, device = np.random.default_rng(4), Device()
        arrays = {
            name: (random.standard_normal(array.shape) * 0.3).astype(np.float16)
            for name, array in weight_arrays(spec).items()
        }
        angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(8) / 8)
        rope = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
        loaded.append(CudaBackend(device, spec, lambda name, array: device.upload(array, arrays[name]), rope))
        return loaded[-1]

    yield make
    for backend in loaded:
        backend.close()


def test_a_long_chunk_has_the_tokens_of_short_ones(load):
    prompt = np.random.default_rng(5).integers(0, 64, 640).astype(np.int32)
    found = []
    for chunk in (64, CONTEXT):
        backend = load(chunk)
        begin(backend, SamplingParams(seed=1), prompt)
        found.append([prefill(backend, prompt).result(), *(decode(backend).result() for _ in range(6))])
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_a_long_chunk_is_tried_with_one_layer(load, monkeypatch):
    tried, original = {}, DeviceModel.prefill_chunk

    def noted(self, rows: int, **options) -> None:
        tried.setdefault(rows, options["num_layers"])
        original(self, rows, **options)

    monkeypatch.setattr(DeviceModel, "prefill_chunk", noted)
    load(CONTEXT)
    assert {rows for rows, layers in tried.items() if layers == 1} == {576, 640, 704}
    assert all(layers is None for rows, layers in tried.items() if rows <= MAX_GRAPH_ROWS)
