"""Conversations of the demo model whose KV comes back from the pool, with each type of KV cache on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError, EdgeLLMError
from engine_core.request import ChatMessage, GenerationRequest, GenerationResult, SamplingParams
from engine_core.serving.engine import Engine

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
SYSTEM = "You are a robot in a house. Answer with one short sentence."
QUESTIONS = {
    "Anna": ["Hello, who are you?", "bring me the red cup", "where is Ben?", "and now go to the kitchen"],
    "Ben": ["Good morning!", "go to the bathroom", "wait two minutes", "thank you"],
}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "engine"
    build_engine(DEMO, directory, quantization="int8")
    return directory


def ask(engine: Engine, messages: list[ChatMessage], **sampling) -> GenerationResult:
    options = SamplingParams(**{"max_new_tokens": 24, **sampling})
    return engine.answer(GenerationRequest("r", tuple(messages), sampling=options))


def talk(engine_dir: Path, classify: bool = False, sampling: dict | None = None, **config) -> list[tuple]:
    """Return the answers to two people who take turns: (ids, cached tokens, tokens known after the turn before)."""
    options = dict(max_context=1024, prefill_chunk=32, num_threads=1, verify_files=False, **config)
    engine = Engine.open(EngineConfig(engine_dir, **options), lambda line: None)
    messages = {name: [ChatMessage("system", SYSTEM)] for name in QUESTIONS}
    known, heard = dict.fromkeys(QUESTIONS, 0), []
    try:
        for turn in range(4):
            for name, questions in QUESTIONS.items():
                messages[name].append(ChatMessage("user", questions[turn]))
                result = ask(engine, messages[name], **(sampling or {}))
                heard.append((result.token_ids, result.cached_tokens, known[name]))
                known[name] = result.prompt_tokens + len(result.token_ids) - 1
                messages[name].append(ChatMessage("assistant", result.text))
                if classify:
                    ask(engine, [ChatMessage("user", f"Is this a question: {questions[turn]}")], max_new_tokens=1)
    finally:
        engine.close()
    return heard


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 11}], ids=["greedy", "seeded"])
def test_what_comes_back_is_what_was_in_the_slot(engine_dir, kind, sampling):
    """In one slot with the pool, two people hear what they hear in a slot each without: the bits are the same."""
    options = {"kv_cache_type": kind, "reproducible": False, "sampling": sampling}
    try:
        apart = talk(engine_dir, max_batch=2, **options)
    except EdgeLLMError as error:
        if kind != "int8":
            raise
        pytest.skip(str(error))
    pooled = talk(engine_dir, session_memory=16, **options)
    assert [ids for ids, *_ in pooled] == [ids for ids, *_ in apart]
    assert [cached for _, cached, _ in pooled[2:]] == [cached for _, cached, _ in apart[2:]]
    for _, cached, known in pooled[2:]:
        assert cached >= known - 24, "all but the last turn"
    assert talk(engine_dir, classify=True, session_memory=16, **options) == pooled


@pytest.mark.slow
def test_a_request_with_a_seed_gives_the_same_text_with_and_without_the_pool(engine_dir):
    """It computes its whole prompt, whatever is kept: int8 rounds a token's KV by the chunk it is computed in."""
    sampling = {"temperature": 0.9, "seed": 11}
    pooled, without = (talk(engine_dir, sampling=sampling, session_memory=memory) for memory in (16, 0))
    assert pooled == [(ids, 0, known) for ids, _, known in without]


def test_an_int8_cache_holds_four_times_the_tokens_of_fp32(engine_dir):
    from engine_core.backends.onnxruntime.plan import resolve
    from engine_core.formats.manifest import read_manifest

    manifest = read_manifest(engine_dir, verify_hashes=False)
    tokens = {}
    for kind in ("fp32", "fp16", "int8"):
        config = EngineConfig(engine_dir, kv_cache_type=kind, session_memory=32, prompt_cache_entries=0)
        tokens[kind] = resolve(engine_dir, manifest, config).pool_tokens
    assert tokens["int8"] == 2 * tokens["fp16"] == 4 * tokens["fp32"] == 4 * (32 << 20) // (8 * 2 * 2 * 64 * 4)
    with pytest.raises(ConfigurationError, match="set it to 16 or more"):
        resolve(engine_dir, manifest, EngineConfig(engine_dir, kv_cache_type="fp32", session_memory=15))
