"""Write conversations for ``--calibration`` of ``edgellm build`` and ``edgellm quantize``, as JSON lines.

They are of the training kind, never a held-out one.

    python -m tools.demo_model.calibration models/demo/calibration.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.demo_model.grammar import Generator

_SEED = 900_001
_CONVERSATIONS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--conversations", type=int, default=_CONVERSATIONS)
    options = parser.parse_args()
    generator = Generator(_SEED)
    with open(options.file, "w", encoding="utf-8") as file:
        for _ in range(options.conversations):
            messages = [{"role": role, "content": text} for role, text in generator.conversation().messages]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
