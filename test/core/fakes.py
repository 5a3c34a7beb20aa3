"""A byte-level tokenizer and a backend whose next token depends on every KV position, for tests of the core."""

from __future__ import annotations

import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from engine_core.backends import TokenSampling
from engine_core.config import EngineConfig
from engine_core.errors import EngineFaultError
from engine_core.formats.manifest import Manifest, ModelGeometry
from engine_core.memory import MemoryItem, MemoryPlan
from engine_core.sampling import Sampler
from engine_core.serving.engine import Engine
from engine_core.text.tokenizer import Tokenizer

BOS, EOS, END = 256, 257, 258
VOCAB_SIZE = 260
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tokenizer(directory) -> None:
    """Ids 0..255 are bytes, 256 <s>, 257 </s>, 258 <end>."""
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
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<end>")])
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    hf.chat_template = TEMPLATE
    hf.save_pretrained(str(directory))


class ScriptedBackend:
    """Says ``script`` (ids) after any prompt, or, without one, tokens that depend on the whole KV cache.

    Works in a thread of its own, as a device would; ``step_time`` seconds a step. ``fail_at``: the step that fails.
    """

    name = "fake"

    def __init__(self, script=None, *, max_context=512, step_time=0.0, fail_at=None, slots=2):
        self.script, self.step_time, self.fail_at = script, step_time, fail_at
        self.max_context, self.vocab_size = max_context, VOCAB_SIZE
        self.reduced_vocab_size = VOCAB_SIZE
        self.kv = np.full(max_context, -1, dtype=np.int32)
        self.slots = [np.full(max_context, -1, dtype=np.int32) for _ in range(slots)]
        self.calls: list[tuple] = []
        self.num_steps = 0
        self._sampler = Sampler(VOCAB_SIZE)
        self._interrupted = self._ended = False
        self._length = 0
        self._last = -1
        self._stream = ThreadPoolExecutor(1)
        self.closed = 0

    def begin(self, sampling: TokenSampling, history: np.ndarray) -> None:
        def work():
            self._sampler.begin(sampling, history)
            self._sampling, self._ended, self._step = sampling, False, 0

        self._interrupted = False
        self._stream.submit(work).result()

    def prefill(self, token_ids, position, mask=None) -> Future:
        self.calls.append(("prefill", len(token_ids), position))
        assert len(token_ids) >= 1 and token_ids.dtype == np.int32
        return self._stream.submit(self._run, token_ids.copy(), position, None if mask is None else mask.copy())

    def extend(self, token_ids, position) -> None:
        self._interrupted = False
        self.calls.append(("extend", len(token_ids), position))
        self.kv[position : position + len(token_ids)] = token_ids

    def decode(self, mask=None) -> Future:
        return self._stream.submit(self._run, None, None, None if mask is None else mask.copy())

    def _run(self, token_ids, position, mask):
        if self._interrupted or self._ended:
            return None
        if token_ids is None:
            token_ids, position = np.array([self._last], dtype=np.int32), self._length
        self.num_steps += 1
        if self.fail_at is not None and self.num_steps >= self.fail_at:
            self._ended = True
            raise EngineFaultError("The fake device fell off the bus.")
        time.sleep(self.step_time)
        self._length = position + len(token_ids)
        assert self._length <= self.max_context
        self.kv[position : self._length] = token_ids
        try:
            self._last = self._sampler.sample(self._logits(), mask)
        except Exception:
            self._ended = True
            raise
        self._step += 1
        self._ended = self._last in self._sampling.stop_ids
        return self._last

    def _logits(self) -> np.ndarray:
        if self.script is not None and self._step < len(self.script):
            logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
            logits[self.script[self._step]] = 10.0
            return logits
        seed = zlib.crc32(self.kv[: self._length].tobytes())
        logits = np.random.default_rng(seed).normal(size=VOCAB_SIZE).astype(np.float32)
        logits[BOS:] -= 100.0  # plain text for ever
        logits[128:256] -= 100.0
        return logits

    def interrupt(self) -> None:
        self._interrupted = True

    def save_prefix(self, slot, length) -> None:
        self.calls.append(("save", slot, length))
        self.slots[slot][:length] = self.kv[:length]

    def load_prefix(self, slot, length) -> None:
        self.calls.append(("load", slot, length))
        self.kv[:length] = self.slots[slot][:length]

    def close(self) -> None:
        self.closed += 1
        self._stream.shutdown()


def make_engine(backend: ScriptedBackend, tokenizer_dir, **config) -> Engine:
    geometry = ModelGeometry("FakeForCausalLM", 1, 8, 8, 1, 1, 8, VOCAB_SIZE, 512, 1000)
    manifest = Manifest("fake", geometry, "fake", "fp32", "fp32", backend.max_context, 1, (EOS, END))
    plan = MemoryPlan((MemoryItem("kv_cache", backend.kv.nbytes),), 1 << 30, "CPU")
    config = EngineConfig(tokenizer_dir, max_context=backend.max_context, **config)
    return Engine(config, manifest, backend, Tokenizer(tokenizer_dir), plan, 0.0)


def text_ids(text: str) -> list[int]:
    return list(text.encode("utf-8"))
