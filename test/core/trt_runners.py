"""The TensorRT exporters run on the CPU, with the KV cache kept in numpy as the backend keeps it on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine_core.models.spec import ModelSpec

POISON = 1000.0  # finite, as the backend's zeroed cache always is; a position that is read before it is written shows


class PlainRunner:
    """The plain exporter on ONNX Runtime. ``cache``: [layers, 1, 2 (K, V), kv_heads, max_context, head_dim]."""

    def __init__(self, model: Path, spec: ModelSpec, max_context: int, dtype=np.float32) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        shape = (len(spec.layers), 1, 2, spec.num_kv_heads, max_context, spec.head_dim)
        self.cache = np.full(shape, POISON, dtype=dtype)

    def run(self, token_ids: np.ndarray, position: int, *, past: int = 0, padding: int = 0) -> np.ndarray:
        """float32 logits after the last of ``token_ids``. ``past``: positions handed in, 0 = all; ``padding``: tokens
        beyond the last, to be ignored."""
        count, past = len(token_ids), past or self.cache.shape[4]
        feeds = {
            "token_ids": np.pad(token_ids, (0, padding), constant_values=5).astype(np.int32),
            "positions": np.arange(position, position + count + padding, dtype=np.int32),
            "last_token": np.array([count - 1], dtype=np.int32),
            "past_index": np.arange(past, dtype=np.int32),
        }
        for layer, cache in enumerate(self.cache[:, 0]):
            feeds[f"past_key.{layer}"], feeds[f"past_value.{layer}"] = cache[:, :, :past]
        outputs = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        for layer, cache in enumerate(self.cache[:, 0]):
            for index, kind in enumerate(("key", "value")):
                new = outputs[f"new_{kind}.{layer}"][:count]
                cache[index, :, position : position + count] = new.swapaxes(0, 1)
        (logits,) = outputs["logits"]
        assert logits.dtype == np.float32
        return logits


class NativeRunner:
    """Run the exporter ``native`` on the onnx reference evaluator; present caches take the place of the past ones."""

    def __init__(self, model: Path, spec: ModelSpec, max_context: int, dtype=np.float32) -> None:
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(str(model))
        shape = (1, spec.num_kv_heads, max_context, spec.head_dim)
        names = [f"past_{kind}.{layer}" for layer in range(len(spec.layers)) for kind in ("key", "value")]
        self.cache = {name: np.full(shape, POISON, dtype=dtype) for name in names}

    def run(self, token_ids: np.ndarray, position: int) -> np.ndarray:
        """float32 logits after the last of ``token_ids``."""
        count = len(token_ids)
        feeds = {
            "token_ids": token_ids.astype(np.int32),
            "positions": np.arange(position, position + count, dtype=np.int32),
            "last_token": np.array([count - 1], dtype=np.int32),
            "write_index": np.array([position], dtype=np.int64),
        }
        outputs = dict(zip(self._evaluator.output_names, self._evaluator.run(None, feeds | self.cache), strict=True))
        for name in self.cache:
            self.cache[name] = outputs[name.replace("past", "present")]
        (logits,) = outputs["logits"]
        assert logits.dtype == np.float32
        return logits
