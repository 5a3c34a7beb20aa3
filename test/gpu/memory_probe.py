"""Measure the GPU memory that loading an engine takes, beside its plan. Arguments: ENGINE_DIR [NAME=VALUE ...].

Prints one JSON line: planned and taken, bytes. For a process of its own: libraries keep what they have loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402

from engine_core.backends import backend_class  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.cuda.driver import Device  # noqa: E402
from engine_core.formats.manifest import read_manifest  # noqa: E402
from engine_core.measure.steps import begin, decode, prefill  # noqa: E402
from engine_core.request import SamplingParams  # noqa: E402

GREEDY = SamplingParams(seed=1)


def main() -> None:
    engine_dir = Path(sys.argv[1])
    config = EngineConfig(engine_dir, **dict(pair.split("=") for pair in sys.argv[2:]))
    manifest = read_manifest(engine_dir, verify_hashes=False)
    kind = backend_class(manifest.backend)
    outer = Device()  # the context is taken before a plan is made
    plan = kind.plan(engine_dir, manifest, config)
    before = outer.memory_info()[0]
    backend = kind.load(engine_dir, manifest, config)
    prompt = np.arange(3, 603, dtype=np.int32)
    begin(backend, GREEDY, prompt)
    prefill(backend, prompt, 0).result()
    for _ in range(8):
        decode(backend).result()
    taken = before - outer.memory_info()[0]
    backend.close()
    runtime = taken - plan.total + plan.item("runtime")
    print(json.dumps({"planned": plan.total, "taken": taken, "runtime_taken": runtime}))
    outer.close()


if __name__ == "__main__":
    main()
