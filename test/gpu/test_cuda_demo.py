"""The demo model through the whole engine: the GPU's greedy answers are the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_core.build.build import build_engine
from engine_core.build.cuda import build_cuda
from engine_core.cancellation import CancelToken
from engine_core.config import EngineConfig
from engine_core.engine import Engine
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams

pytestmark = pytest.mark.gpu
pytest.importorskip("onnxruntime")

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
PLACES = ("kitchen", "bedroom", "living room", "bathroom", "office", "hallway", "garage", "garden")
THINGS = ("cup", "book", "apple", "phone", "towel")
COMMANDS = [f"Bring the {thing} from the {place}." for thing in THINGS for place in PLACES]
COMMANDS += [f"Go to the {place}, wait {n} seconds and say hello." for place in PLACES for n in range(1, 21)]


def answers(engine_dir: Path) -> list[str]:
    engine = Engine.open(EngineConfig(engine_dir))
    try:
        found = []
        for command in COMMANDS:
            request = GenerationRequest(
                "1", (ChatMessage("user", command),), sampling=SamplingParams(max_new_tokens=256)
            )
            pieces = engine.generate(engine.prepare(request), CancelToken())
            found.append("".join(piece.text for piece in pieces))
        return found
    finally:
        engine.close()


@pytest.mark.slow
def test_greedy_answers_are_those_of_the_cpu(tmp_path):
    build_engine(MODEL, tmp_path / "cpu", quantization="fp32")
    build_cuda(MODEL, tmp_path / "gpu", dtype="fp16")
    on_cpu, on_gpu = answers(tmp_path / "cpu"), answers(tmp_path / "gpu")
    assert len(COMMANDS) == 200 and all(on_cpu)
    different = [command for command, a, b in zip(COMMANDS, on_cpu, on_gpu, strict=True) if a != b]
    # Rounding to 16 bits may turn a tie; one answer in a hundred is the most that is put down to it.
    assert len(different) <= 2, different
