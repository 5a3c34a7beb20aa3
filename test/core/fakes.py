"""A byte-level tokenizer and a backend whose next token depends on every KV position, for tests of the core."""

from __future__ import annotations

import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from engine_core.backends import Draft
from engine_core.config import EngineConfig
from engine_core.errors import EngineFaultError
from engine_core.formats.manifest import Manifest
from engine_core.memory import MemoryItem, MemoryPlan
from engine_core.models.rope import RopeSpec
from engine_core.models.spec import LayerSpec, ModelSpec
from engine_core.request import SAMPLING_OPTIONS, SamplingParams
from engine_core.sampling import Sampler
from engine_core.serving.engine import Engine
from engine_core.text.tokenizer import Tokenizer

BOS, EOS, END = 256, 257, 258
VOCAB_SIZE = 260
_LONG = 1 << 28  # what marks the KV of long sequences
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tokenizer(directory, *, more_tokens=(), template=TEMPLATE) -> None:
    """Ids 0..255 are bytes, 256 <s>, 257 </s>, 258 <end>, and then special tokens ``more_tokens``."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    by_byte = {byte: chr(byte) for byte in printable}
    by_byte.update({byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in printable)})
    assert sorted(by_byte.values()) == alphabet
    fast = Fast(models.BPE(vocab={by_byte[byte]: byte for byte in range(256)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<end>", *more_tokens)]
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    hf.chat_template = template
    hf.save_pretrained(str(directory))


def write_calibration(directory) -> None:
    """Write texts that this tokenizer takes, where ``build`` looks for those of a checkpoint."""
    (directory / "calibration.txt").write_text("\n".join(f"{i} times {i} is {i * i}, isn't it?" for i in range(90)))


def write_small_tokenizer(directory) -> None:
    """tokenizer.json alone, of two tokens."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(directory / "tokenizer.json"))


class _Slot:
    """The state of one sequence on the fake device."""

    def __init__(self, max_context: int) -> None:
        self.kv = np.full(max_context, -1, dtype=np.int32)
        self.sampler = Sampler(VOCAB_SIZE)
        self.sampling = SamplingParams()
        self.interrupted = self.ended = False
        self.length = self.num_sampled = 0
        self.last = -1
        self.adapter = ""
        self.long_rope = False

    def cut(self, length: int) -> None:
        """Forget what a draft has left beyond ``length``; its KV stays there, as on a device."""
        self.length = length


class ScriptedBackend:
    """Says ``script`` (ids) after any prompt, or, without one, tokens that depend on the whole KV of the sequence.

    Works in a thread of its own, as a device would; ``step_time`` seconds a step. ``fail_at``: the step that fails.
    ``rope_switch``: as of a backend; a sequence's KV must be all of its own length's kind.
    ``steps``: the slots of each step that was queued; ``prompts``: the tokens of prompts in it. ``memory``: the tokens
    before the next one that it depends on; 0: all of them. ``row_cost``: of a token of a step beyond the first.
    """

    name = "fake"
    kept_ids = None
    sampler_options = frozenset(SAMPLING_OPTIONS)
    undrafted_options: frozenset[str] = frozenset()
    has_states, state_places = False, 0

    def __init__(self, script=None, *, max_context=512, step_time=0.0, fail_at=None, pool_tokens=1024, num_slots=1,
                 prefill_chunk=512, max_draft=0, exact_drafts=True, memory=0, row_cost=0.01,
                 rope_switch=0):  # fmt: skip
        self.rope_switch = rope_switch
        self.max_draft, self.exact_drafts, self.step_seconds = max_draft, exact_drafts, 0.0
        self.memory, self.row_cost = memory, row_cost
        self.script, self.step_time, self.fail_at = script, step_time, fail_at
        self.max_context, self.vocab_size = max_context, VOCAB_SIZE
        self.reduced_vocab_size = VOCAB_SIZE
        self.num_slots, self.prefill_chunk = num_slots, prefill_chunk
        self._slots = [_Slot(max_context) for _ in range(num_slots)]
        self.pool_tokens = pool_tokens
        self._pool = np.full(pool_tokens, -1, dtype=np.int32)
        self.calls: list[tuple] = []
        self.steps: list[tuple[int, ...]] = []
        self.prompts: list[list[int | None]] = []
        self.drafts: list[int] = []  # tokens drafted, of each sequence's step
        self.num_steps = 0
        self._stream = ThreadPoolExecutor(1)
        self.closed = 0

    @classmethod
    def check_here(cls, manifest) -> None:
        pass

    def begin(self, slot, sampling, history, adapter="", images=()) -> None:
        def work():
            state.sampler.begin(sampling, history)
            state.sampling, state.ended, state.num_sampled = sampling, False, 0
            state.adapter = adapter

        state = self._slots[slot]
        state.interrupted = False
        self._stream.submit(work).result()

    def step(self, steps) -> list[Future]:
        copies = []
        for step in steps:
            if step.token_ids is not None:
                self.calls.append(("prefill" if step.samples else "extend", len(step.token_ids), step.position))
                assert len(step.token_ids) >= 1 and step.token_ids.dtype == np.int32
            draft = step.draft
            if draft is not None:
                assert step.token_ids is None and 0 < len(draft.token_ids) == len(draft.forced) <= self.max_draft
                draft = Draft(*(None if array is None else array.copy() for array in draft))
            copies.append(
                step._replace(
                    token_ids=None if step.token_ids is None else step.token_ids.copy(),
                    mask=None if step.mask is None else step.mask.copy(),
                    draft=draft,
                )
            )
        self.steps.append(tuple(step.slot for step in steps))
        self.drafts.extend(0 if step.draft is None else len(step.draft.token_ids) for step in steps)
        self.prompts.append([None if step.token_ids is None else len(step.token_ids) for step in steps])
        assert len(set(self.steps[-1])) == len(steps)
        futures: list[Future] = [Future() for _ in steps]
        self._stream.submit(self._run, copies, futures)
        return futures

    def _run(self, steps, futures) -> None:
        fault = None
        active = [step for step in steps if not (self._slots[step.slot].interrupted or self._slots[step.slot].ended)]
        if active:
            self.num_steps += 1
            try:
                self.check_device()
            except EngineFaultError as error:
                fault = error
            else:
                time.sleep(self.step_time)
        for step, future in zip(steps, futures):
            try:
                if fault is not None:
                    raise fault
                future.set_result(self._run_one(step) if step in active else None)
            except BaseException as error:
                self._slots[step.slot].ended = True
                future.set_exception(error)

    def check_device(self) -> None:
        if self.fail_at is not None and self.num_steps >= self.fail_at:
            raise EngineFaultError("The fake device fell off the bus.")

    def step_cost(self, rows) -> float:
        return 1.0 + self.row_cost * (sum(rows) - 1)

    def _verify(self, step) -> tuple[int, ...]:
        state, ids = self._slots[step.slot], step.draft.token_ids.tolist()
        start, found = state.length, []
        end = start + 1 + len(ids)
        assert end <= self.max_context
        state.kv[start:end] = self._kv(state, [state.last, *ids])
        for i in range(len(ids) + 1):
            state.cut(start + i + 1)
            mask = step.mask if i == 0 else None if step.draft.masks is None else step.draft.masks[i - 1]
            if i < len(ids) and step.draft.forced[i]:
                state.sampler.advance(ids[i])
                token = ids[i]
            else:
                token = state.sampler.sample(self.logits(state), mask)
            found.append(token)
            state.num_sampled += 1
            state.ended = token in state.sampling.stop_token_ids
            if state.ended or i == len(ids) or token != ids[i]:
                break
        state.last = found[-1]
        return tuple(found)

    def _run_one(self, step) -> int | tuple[int, ...] | None:
        if step.draft is not None:
            return self._verify(step)
        state = self._slots[step.slot]
        token_ids, position = step.token_ids, step.position
        if token_ids is None:
            token_ids, position = np.array([state.last], dtype=np.int32), state.length
        state.length = position + len(token_ids)
        assert state.length <= self.max_context
        if step.token_ids is not None:
            state.long_rope = step.long_rope
        state.kv[position : state.length] = self._kv(state, token_ids)
        if not step.samples:
            return None
        state.last = state.sampler.sample(self.logits(state), step.mask)
        state.num_sampled += 1
        state.ended = state.last in state.sampling.stop_token_ids
        return state.last

    def _kv(self, state: _Slot, token_ids) -> np.ndarray:
        adapter = (zlib.crc32(state.adapter.encode()) & 0xFFFF) * VOCAB_SIZE
        return np.array(token_ids, dtype=np.int32) + adapter + state.long_rope * _LONG

    def logits(self, state: _Slot) -> np.ndarray:
        is_long = 0 < self.rope_switch < state.length
        assert not self.rope_switch or ((state.kv[: state.length] >= _LONG) == is_long).all(), "KV of another length"
        if self.script is not None and state.num_sampled < len(self.script):
            logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
            logits[self.script[state.num_sampled]] = 10.0
            return logits
        seed = zlib.crc32(state.kv[max(0, state.length - self.memory) if self.memory else 0 : state.length].tobytes())
        logits = np.random.default_rng(seed).normal(size=VOCAB_SIZE).astype(np.float32)
        logits[BOS:] -= 100.0  # plain text for ever
        logits[128:256] -= 100.0
        return logits

    def interrupt(self, slot) -> None:
        self._slots[slot].interrupted = True

    def save_kv(self, slot, position, place, count) -> None:
        self.calls.append(("save", place, count))
        self._stream.submit(self._copy, slot, position, place, count, save=True)

    def load_kv(self, slot, position, place, count) -> None:
        self.calls.append(("load", place, count))
        self._stream.submit(self._copy, slot, position, place, count, save=False)

    def _copy(self, slot, position, place, count, save) -> None:
        live, kept = self._slots[slot].kv[position : position + count], self._pool[place : place + count]
        assert len(live) == len(kept) == count > 0
        target, source = (kept, live) if save else (live, kept)
        target[:] = source

    def close(self) -> None:
        self.closed += 1
        self._stream.shutdown()


def fake_model(max_position: int = 512) -> ModelSpec:
    """The smallest model there is, of which the fakes need the vocabulary alone."""
    sizes = dict(hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1, head_dim=8, vocab_size=VOCAB_SIZE)
    parts = dict(ropes=(RopeSpec(8, 10000.0),), layers=(LayerSpec(0),))
    return ModelSpec("FakeForCausalLM", **sizes, max_position=max_position, **parts)


def make_engine(backend: ScriptedBackend, tokenizer_dir, **config) -> Engine:
    manifest = Manifest("fake", fake_model(), "fake", "fp32", "fp32", backend.max_context, 1, (EOS, END))
    plan = MemoryPlan((MemoryItem("kv_cache", 4 * backend.max_context * backend.num_slots),), 1 << 30, "CPU")
    config = EngineConfig(tokenizer_dir, max_context=backend.max_context, **config)
    return Engine(config, manifest, backend, Tokenizer(tokenizer_dir), plan, 0.0)


def text_ids(text: str) -> list[int]:
    return list(text.encode("utf-8"))
