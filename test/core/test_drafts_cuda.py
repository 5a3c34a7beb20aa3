"""Steps of the CUDA backend that check a draft, on a driver in host memory with the kernels' references."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from draft_steps import alternating, answer, with_drafts
from engine_core.backends import Draft, SequenceStep
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.layout import DRAFT_SIZES, CudaSpec, planned_bytes
from engine_core.config import EngineConfig
from engine_core.cuda.kernels import tuning
from engine_core.cuda.kernels.launch_configs import PackedGemvProblem
from engine_core.formats.manifest import read_manifest
from engine_core.measure.random_checkpoint import write_random_checkpoint
from engine_core.request import SamplingParams
from small_llama import CONFIG
from test_batch_cuda import COUNT, MASK, PROMPTS, VOCAB, load, make_spec  # noqa: F401

GREEDY = SamplingParams(seed=1)


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_a_draft_changes_no_answer(load, max_batch, use_cuda_graph):  # noqa: F811
    plain = load(max_batch)
    backend = load(max_batch, use_cuda_graph, drafts=True)
    slot = max_batch - 1
    for prompt in PROMPTS:
        expected = answer(plain, prompt, 20, slot)
        assert None not in expected
        assert with_drafts(backend, prompt, expected, slot) == expected
        assert answer(backend, prompt, 20, slot) == expected  # no draft: the state of the one before is gone


def test_a_draft_may_be_as_long_as_it_says_and_end_anywhere(load):  # noqa: F811
    backend = load(1, drafts=True)
    expected = answer(backend, PROMPTS[1], 40)
    for right in range(backend.max_draft + 1):
        first = answer(backend, PROMPTS[1], 1)[0]
        guess = np.array(expected[1 : 1 + backend.max_draft], dtype=np.int32)
        guess[right:] = (guess[right:] + 1) % VOCAB
        step = SequenceStep(0, draft=Draft(guess, np.zeros(backend.max_draft, dtype=bool)))
        found = backend.step([step])[0].result()
        assert [first, *found] == expected[: right + 2]
        assert backend.step([SequenceStep(0)])[0].result() == expected[right + 2]


def test_each_row_has_its_own_mask_and_forced_text_is_taken_as_it_is(load):  # noqa: F811
    backend = load(1, drafts=True)
    backend.begin(0, GREEDY, PROMPTS[2])
    first = backend.step([SequenceStep(0, PROMPTS[2], 0, MASK)])[0].result()
    only = np.zeros((3, VOCAB // 32), dtype=np.uint32)
    only[np.arange(3), [0, 1, 2]] = 1 << 7  # ids 7, 39, 71
    draft = Draft(np.array([11, 7, 39], dtype=np.int32), np.array([True, False, True]), only)
    tokens = backend.step([SequenceStep(0, mask=MASK, draft=draft)])[0].result()
    assert first % 2 == 0 and tokens == (11, 7, 39, 71)
    # The same tokens one by one, which the model would not all have chosen.
    backend.begin(0, GREEDY, PROMPTS[2])
    fed = np.concatenate([PROMPTS[2], [first, 11, 7, 39, 71]]).astype(np.int32)
    expected = backend.step([SequenceStep(0, fed, 0)])[0].result()
    backend.begin(0, GREEDY, PROMPTS[2])
    backend.step([SequenceStep(0, PROMPTS[2], 0, MASK)])[0].result()
    backend.step([SequenceStep(0, mask=MASK, draft=draft)])[0].result()
    assert backend.step([SequenceStep(0)])[0].result() == expected


def test_sequences_with_and_without_a_draft_share_a_step(load):  # noqa: F811
    plain, backend = load(3), load(3, drafts=True)
    expected = [answer(plain, prompt, COUNT) for prompt in PROMPTS[:3]]
    assert alternating(backend, PROMPTS[:3], expected) == expected


def test_a_stop_token_and_an_interrupt_end_a_draft(load):  # noqa: F811
    backend = load(1, drafts=True)
    expected = answer(backend, PROMPTS[3], 12)
    stop = next(token for token in expected[2:] if token not in expected[:2])
    index = expected.index(stop)
    guess = np.array(expected[1:10], dtype=np.int32)
    draft = Draft(guess, np.zeros(9, dtype=bool))
    for forced in (False, True):
        backend.begin(0, dataclasses.replace(GREEDY, stop_token_ids=frozenset([stop])), PROMPTS[3])
        backend.step([SequenceStep(0, PROMPTS[3], 0)])[0].result()
        step = SequenceStep(0, draft=draft._replace(forced=np.full(9, forced)))
        assert list(backend.step([step])[0].result()) == expected[1 : index + 1]
        assert backend.step([SequenceStep(0)])[0].result() is None
        assert backend.step([step])[0].result() is None
    backend.begin(0, GREEDY, PROMPTS[3])
    backend.step([SequenceStep(0, PROMPTS[3], 0)])[0].result()
    pending = backend.step([SequenceStep(0, draft=draft)])[0]
    backend.interrupt(0)
    assert pending.result() is None


def test_a_context_that_no_draft_fits_into_has_none(tmp_path):
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", CONFIG)
    build_cuda(checkpoint, tmp_path / "engine", max_context=64)
    manifest = read_manifest(tmp_path / "engine")
    specs = [
        CudaSpec.create(manifest, EngineConfig(tmp_path / "engine", speculation="on", max_context=tokens))
        for tokens in (DRAFT_SIZES[-1], DRAFT_SIZES[-1] + 1)
    ]
    assert [spec.drafts for spec in specs] == [False, True] and specs[0].draft_sizes == []


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    directory = tmp_path_factory.mktemp("int4")
    checkpoint = write_random_checkpoint(directory / "checkpoint", CONFIG | {"vocab_size": VOCAB}, scale=0.15)
    build_cuda(checkpoint, directory / "engine", quantization="int4", max_context=96)
    return directory / "engine"


@pytest.mark.parametrize("max_batch, most", [(1, 7), (8, 7), (9, 15)])
def test_packed_weights_take_as_many_rows_as_their_gemv_unless_there_are_more_sequences(driver, int4, max_batch, most):
    """A draft of a GEMV's rows or of a GEMM's; every step of an engine takes the one of them."""
    loaded = []
    try:
        for speculation in ("off", "on"):
            config = EngineConfig(int4, max_batch=max_batch, speculation=speculation, tune_kernels=False)
            loaded.append(CudaBackend.load(int4, read_manifest(int4), config))
        plain, backend = loaded
        assert (plain.max_draft, backend.max_draft) == (0, most)
        slot, prompt = max_batch - 1, PROMPTS[1]
        expected = answer(plain, prompt, 14, slot)
        assert None not in expected and len(set(expected)) > 1
        assert with_drafts(backend, prompt, expected, slot) == expected
    finally:
        for each in loaded:
            each.close()


@pytest.mark.parametrize("max_batch", [1, 2])
def test_what_is_measured_is_what_a_step_launches(driver, int4, monkeypatch, tmp_path, max_batch):
    """A GEMV of a draft's rows has no norm, which the one of a step of one token has: another problem."""
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "TIME_LIMIT", 600.0)
    timed = []
    monkeypatch.setattr(tuning.EventTimer, "__call__", lambda self, work: timed.append(list(work)) or 1.0)
    config = EngineConfig(int4, max_batch=max_batch, speculation="on", tune_kernels=True)
    CudaBackend.load(int4, read_manifest(int4), config).close()
    problems = {launch.problem for work in timed for launch in work if hasattr(launch, "problem")}
    normed = {problem.normed for problem in problems if isinstance(problem, PackedGemvProblem)}
    assert all(timed) and normed == ({False, True} if max_batch == 1 else {False})


def test_what_drafts_take_is_planned_and_their_cost_known(load):  # noqa: F811
    with_, without = (planned_bytes(make_spec(1, drafts=drafts), 8) for drafts in (True, False))
    assert with_["io"] > without["io"] and with_["scratch"] > without["scratch"]
    assert with_["weights"] == without["weights"]
    backend = load(3, drafts=True)
    assert backend.max_draft == DRAFT_SIZES[-1] - 1 and load(1).max_draft == 0 and capabilities_of("cuda").drafts
    assert backend.undrafted_options == {"repetition_penalty", "logit_bias"}
    assert backend.step_cost([1]) == 1.0
    assert 0.0 < backend.step_cost([2]) == backend.step_cost([4]) < backend.step_cost([2, 2, 1])
