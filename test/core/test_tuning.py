"""Measuring launch configurations with a fake timer: what is chosen, kept, reused, and when it ends."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest

from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.layout import CudaSpec
from engine_core.cuda.driver import Device, DeviceError, KernelCompileError
from engine_core.cuda.kernels import source_hash
from engine_core.cuda.kernels.launch_configs import (
    DecodeAttentionProblem,
    GemvConfig,
    GemvProblem,
    Gpu,
    LaunchConfigs,
    PackedRowsProblem,
)
from engine_core.cuda.kernels.tuning import ConfigFile, Tuner
from engine_core.formats.weight_formats import weight_format
from engine_core.models.shapes import spec_of
from fake_gpu import FakeDriver, install
from fake_kernels import KERNELS

ORIN = Gpu("Orin", 87, 8, 166912)
H200 = Gpu("H200", 90, 132, 232448)
SMALL, LARGE = GemvProblem(1024, 1024), GemvProblem(28672, 4096)
ATTENTION = DecodeAttentionProblem(32, 8, 128, False, False)
PROBLEMS = [ATTENTION, SMALL, LARGE]


class Machine:
    """A GPU whose times are made up: ``seconds`` of a configuration, else 1. A measurement takes ``cost`` seconds."""

    def __init__(self, directory, gpu: Gpu = ORIN, cost: float = 0.0, kernels: str = "1") -> None:
        self.configs = LaunchConfigs(gpu)
        self.file = ConfigFile(directory, gpu, "fp16", kernels)
        self.seconds: dict = {}
        self.cost, self.now = cost, 0.0
        self.timed: list = []  # (problem, config)
        self.compiled: list = []

    def work_of(self, problem) -> list:
        return [(problem, self.configs.lookup(problem))]

    def compile_ahead(self, prepare) -> None:
        self.compiled.append(prepare())

    def timer(self, work) -> float:
        self.timed += work
        self.now += self.cost
        found = self.seconds.get(work[0][1], 1.0)
        if isinstance(found, Exception):
            raise found
        return found

    def tune(self, problems=PROBLEMS, time_limit: float = 10.0) -> int:
        return Tuner(
            *(self.configs, self.file, self.work_of, self.compile_ahead, self.timer),
            clock=lambda: self.now,
            time_limit=time_limit,
        ).choose(problems)

    def chosen(self, problems=PROBLEMS) -> list:
        return [self.configs.lookup(problem) for problem in problems]


def fastest(machine: Machine, problem, index: int = -1):
    """Makes one of the candidates the fastest."""
    config = problem.candidates(machine.configs.gpu)[index]
    machine.seconds[config] = 0.5
    return config


def test_the_fastest_candidate_is_chosen_and_reused(tmp_path):
    first = Machine(tmp_path)
    expected = [fastest(first, problem) for problem in PROBLEMS]
    assert first.tune() == 3 and first.chosen() == expected
    for problem in PROBLEMS:
        assert [config for p, config in first.timed if p == problem] == problem.candidates(ORIN)
    again = Machine(tmp_path)
    again.seconds = {config: 0.1 for problem in PROBLEMS for config in problem.candidates(ORIN)[:1]}
    assert again.tune() == 0 and again.chosen() == expected and not again.timed and not again.compiled


def test_large_problems_and_early_kinds_come_first(tmp_path):
    machine = Machine(tmp_path)
    machine.tune()
    assert list(dict.fromkeys(problem for problem, _ in machine.timed)) == [LARGE, SMALL, ATTENTION]


def test_a_small_gain_does_not_replace_the_rule(tmp_path):
    machine = Machine(tmp_path)
    rule, other, *_ = LARGE.candidates(ORIN)
    machine.seconds[other] = 0.98
    machine.tune()
    assert machine.configs.lookup(LARGE) == rule


def test_what_the_time_does_not_suffice_for_keeps_its_rule_for_good(tmp_path):
    machine = Machine(tmp_path, cost=1.0)
    large, small = fastest(machine, LARGE, 1), fastest(machine, SMALL, 1)
    limit = len(LARGE.candidates(ORIN)) - 0.5
    assert machine.tune(time_limit=limit) == 1
    rules = [ATTENTION.candidates(ORIN)[0], SMALL.candidates(ORIN)[0], large]
    assert machine.chosen() == rules and rules[1] != small
    later = Machine(tmp_path)
    fastest(later, SMALL, 1)
    assert later.tune() == 0 and later.chosen() == rules


def test_the_limit_holds_within_the_candidates_of_a_problem(tmp_path):
    machine = Machine(tmp_path, cost=4.0)
    machine.tune(time_limit=10.0)
    assert len(machine.timed) == 3 and machine.now <= 10.0 + machine.cost


def test_new_problems_are_measured_and_old_ones_stay(tmp_path):
    machine = Machine(tmp_path)
    chosen = fastest(machine, LARGE)
    machine.tune([LARGE])
    other = Machine(tmp_path)
    other.tune([LARGE, SMALL])
    assert {problem for problem, _ in other.timed} == {SMALL}
    assert other.configs.lookup(LARGE) == chosen
    assert len(json.loads(other.file.path.read_text())["configs"]) == 2


def test_a_gpu_of_the_table_is_not_measured(tmp_path):
    machine = Machine(tmp_path, H200)
    assert machine.tune() == 0 and not machine.timed and not machine.file.path.exists()


def test_other_gpus_kernels_and_types_have_files_of_their_own(tmp_path):
    paths = {
        ConfigFile(tmp_path, gpu, dtype, kernels).path
        for gpu in (ORIN, Gpu("Orin", 87, 16, 166912), Gpu("Orin NX", 87, 8, 166912), Gpu("Orin", 86, 8, 166912))
        for dtype in ("fp16", "bf16")
        for kernels in ("1", "2")
    }
    assert len(paths) == 16 and all("sm_8" in path.name for path in paths)


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: "{",
        lambda stored: "[]",
        lambda stored: json.dumps({**stored, "kernels": "2"}),
        lambda stored: json.dumps({**stored, "configs": [1]}),
        lambda stored: json.dumps({**stored, "configs": {key: 5 for key in stored["configs"]}}),
        lambda stored: json.dumps({**stored, "configs": {key: {"depth": 9} for key in stored["configs"]}}),
    ],
)
def test_a_damaged_file_is_measured_again(tmp_path, damage):
    machine = Machine(tmp_path)
    machine.tune()
    machine.file.path.write_text(damage(json.loads(machine.file.path.read_text())))
    again = Machine(tmp_path)
    expected = fastest(again, LARGE)
    assert again.tune() == 3 and again.configs.lookup(LARGE) == expected
    third = Machine(tmp_path)
    assert third.tune() == 0 and third.configs.lookup(LARGE) == expected


def test_a_stored_configuration_that_is_no_candidate_is_not_launched(tmp_path):
    machine = Machine(tmp_path)
    machine.file.write({LARGE: GemvConfig(5, 5, 4, 99)})
    assert machine.tune([LARGE]) == 1 and machine.configs.lookup(LARGE) in LARGE.candidates(ORIN)


def test_without_a_file_nothing_is_measured(tmp_path):
    """Else two processes would choose differently, and answer differently."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    machine = Machine(blocked / "directory")
    fastest(machine, LARGE)
    assert machine.tune() == 0 and not machine.timed
    assert machine.chosen() == [problem.candidates(ORIN)[0] for problem in PROBLEMS]


@pytest.mark.parametrize("error", [DeviceError("no"), KernelCompileError("no")])
def test_a_candidate_that_fails_leaves_the_rule(tmp_path, error):
    machine = Machine(tmp_path)
    expected = fastest(machine, SMALL)
    machine.seconds[LARGE.candidates(ORIN)[1]] = error
    fastest(machine, LARGE)
    assert machine.tune() == 3
    assert machine.chosen([LARGE, SMALL]) == [LARGE.candidates(ORIN)[0], expected]


def test_a_problem_of_one_candidate_is_not_timed(tmp_path, monkeypatch):
    machine = Machine(tmp_path)
    problem = PackedRowsProblem(64, 64, 64, 4)
    monkeypatch.setattr(PackedRowsProblem, "variants", lambda self, gpu: [])
    machine.tune([problem])
    assert not machine.timed and machine.configs.lookup(problem) == problem.candidates(ORIN)[0]


# --- a model with packed weights on the fake GPU --------------------------------------------------------

MODEL = dict(
    architectures=["LlamaForCausalLM"],
    num_hidden_layers=2,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=64,
    rms_norm_eps=1e-5,
)
SPEC = CudaSpec(
    model=spec_of(MODEL),
    head_rows=64,
    dtype="fp16",
    kv_int8=False,
    max_context=128,
    weight_format=weight_format("int4"),
    chunk=64,
    pool_tokens=0,
)


def test_a_model_measures_every_kernel_it_launches(monkeypatch, tmp_path):
    driver = FakeDriver(memory=1 << 28)  # 8 SMs, compute capability 9.0: not in the table
    install(monkeypatch, driver)
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    launched: set[tuple] = set()
    for entry in ("gemv_packed", "gemm_packed", "dequantize_packed", *KERNELS, "sample_scan", "sample_pick"):
        driver.kernels[entry] = lambda defines, args, entry=entry: launched.add((entry, *sorted(defines.items())))
    times = itertools.count()
    driver.milliseconds = lambda: 0.9 ** next(times)
    allocations = {}
    for tune_kernels in (False, True):
        device = Device()
        source = lambda name, array: device.upload(array, np.zeros(array.nbytes, np.uint8))  # noqa: B023, E731
        rope = np.zeros((128, 16, 2), dtype=np.float32)
        backend = CudaBackend(device, SPEC, source, rope, tune_kernels=tune_kernels)
        allocations[tune_kernels] = device.allocations
        if not tune_kernels:
            backend.close()
            launched.clear()
    assert allocations[True] == allocations[False]
    configs, kernels = backend._model._kernels.configs, backend._model._kernels
    asked = set(kernels.problems(lambda: backend._model._prepare(0)))
    backend.close()
    assert {type(problem).__name__ for problem in asked} == {
        *("PackedGemvProblem", "PackedGemmProblem", "PackedRowsProblem"),
        *("DecodeAttentionProblem", "PrefillAttentionProblem"),
    }
    stored = json.loads(next(tmp_path.glob("launch-configs-*")).read_text())["configs"]
    assert set(stored) == {problem.key for problem in asked}
    assert all(configs.lookup(problem) == problem.candidates(configs.gpu)[-1] for problem in asked)
    assert any(("SPLITS", 8) in entry for entry in launched if entry[0] == "attention_decode")  # two CTAs an SM


def test_the_hash_covers_the_kernels():
    assert source_hash() == source_hash() and len(source_hash()) == 64


def test_no_temporary_file_is_left(tmp_path):
    Machine(tmp_path).tune()
    assert len(os.listdir(tmp_path)) == 1
