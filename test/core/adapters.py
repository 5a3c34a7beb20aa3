"""Random LoRA adapters as peft writes them, by peft itself, and what transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints


def write(directory: Path, checkpoint: Path, *, seed: int = 1, scale: float = 0.15, **config: Any) -> Path:
    """Write an adapter of ``checkpoint`` with random A and B; ``config``: of peft's LoraConfig."""
    import peft
    import torch

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(checkpoints.reference(checkpoint), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, scale)
    model.save_pretrained(str(directory))
    return directory


def reference(checkpoint: Path, adapter: Path | None):
    """Return the checkpoint in transformers, float32, with the adapter as peft applies it."""
    import peft

    model = checkpoints.reference(checkpoint)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter)).eval()
