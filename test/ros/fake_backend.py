"""A backend for tests of the node: the core's ScriptedBackend as an engine directory makes it.

``Manifest.options``: ``script`` (text it says; else text that depends on the whole KV cache and never ends),
``answers`` (text → what it says instead to a prompt that holds it; of several the one that stands last),
``step_time`` (s), ``load_time`` (s), ``fault_file`` (while this file exists, every step fails), ``fail_load``,
``max_draft`` (tokens).
"""

from __future__ import annotations

import time
from pathlib import Path

from engine_core.backends.kv_pool import pool_tokens
from engine_core.errors import EngineFaultError
from engine_core.formats.manifest import Manifest, seal, write_variant
from engine_core.memory import MemoryItem, MemoryPlan
from engine_core.progress import untold
from fakes import BOS, END, EOS, ScriptedBackend, fake_model, write_tokenizer

MAX_CONTEXT = 2048
TOKEN_BYTES = 256  # of its KV, as it says
_LOAD_PARTS = 5


class FakeBackend(ScriptedBackend):
    """ScriptedBackend as a variant's backend; the manifest's options say how it behaves."""

    @classmethod
    def plan(cls, variant_dir, manifest, config) -> MemoryPlan:
        return MemoryPlan((MemoryItem("kv_cache", config.max_context * 4),), 1 << 30, "fake device")

    @classmethod
    def load(cls, variant_dir, manifest, config, *, progress=untold) -> FakeBackend:
        options = manifest.options
        if options.get("fail_load"):
            raise EngineFaultError("The fake device did not answer.")
        for part in range(1, _LOAD_PARTS + 1):
            time.sleep(options.get("load_time", 0.0) / _LOAD_PARTS)
            progress(part / _LOAD_PARTS)
        script = options.get("script")
        backend = cls(
            None if script is None else [*script.encode("utf-8"), EOS],
            max_context=config.max_context, step_time=options.get("step_time", 0.0),
            pool_tokens=pool_tokens(config, config.max_context, TOKEN_BYTES),
            max_draft=0 if config.speculation == "off" else options.get("max_draft", 0),
        )  # fmt: skip
        backend.answers = {key.encode("utf-8"): value for key, value in options.get("answers", {}).items()}
        backend.fault_file = Path(options["fault_file"]) if "fault_file" in options else None
        return backend

    def begin(self, slot, sampling, history, adapter="", images=()) -> None:
        prompt = bytes(token for token in history.tolist() if token < BOS)
        said = max(self.answers, key=prompt.rfind, default=b"")
        if said and said in prompt:
            self.script = [*self.answers[said].encode("utf-8"), EOS]
        super().begin(slot, sampling, history, adapter, images)

    def check_device(self) -> None:
        super().check_device()
        if self.fault_file is not None and self.fault_file.exists():
            raise EngineFaultError("The fake device fell off the bus.")

    def logits(self, state):
        logits = super().logits(state)
        if self.script is None:
            logits[:32] -= 100.0  # printable text: a ROS string ends at a NUL
        return logits


def write_engine(
    directory: Path, *, backend: str = "fake", template: str = "", max_context: int = MAX_CONTEXT, **options
) -> Path:
    """A whole engine directory for FakeBackend; of another ``backend``, one that it refuses. ``template``: of chats,
    "" = that of the fakes."""
    manifest = Manifest(
        "fake", fake_model(max_context), backend, "fp32", "fp32", max_context, 1, (EOS, END), options=options
    )
    with write_variant(directory) as temporary:
        write_tokenizer(temporary)
        if template:
            (temporary / "chat_template.jinja").write_text(template)
        seal(temporary, manifest)
    return directory
