"""Time the first token after an image, and after a second question on the same one, beside transformers.

    python3 benchmarks/vision.py DIR [--backend onnxruntime] [--shape smolvlm-256m] [--weights fp32 int8]
                                 [--image-tokens 64] [--threads 2] [--repeats 3] [--reference] [--beside]

Writes a checkpoint of the shape of a published model with random weights to DIR/SHAPE, and an engine for each of
``--weights`` beside it, unless they are there. Each repeat takes a new random picture of 640 x 480 pixels, so that
nothing is known of it, and asks one question and then another. ``--reference`` asks transformers (torch, float32 with
as many threads, or fp16 on the GPU with ``--backend cuda``) the first question in the same turns. A row of medians for
each goes to benchmarks/results/vision.jsonl:

- prepare_ms: scaling and cutting the picture, on the host. Rows without it have it in encode_ms.
- encode_ms: the encoder and the projector. prefill_ms: the prompt with the features there, up to its first token.
- load_average: of the machine, in the five minutes before; above the number of cores, ratios alone mean something.
- ttft_ms: from the request to its first token. second_ttft_ms: of the second question; transformers keeps nothing.
- with --beside, of an engine with two slots: gap_ms, the longest time between two tokens of a text answer while an
  image is seen in the other slot, and token_ms, the median one while it runs alone; beside_ttft_ms, of the image.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.vision_shapes import PATCHES, SHAPES, TILE, TILE_TOKENS, VisionShape  # noqa: E402
from engine_core.backends import SequenceStep  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, SamplingParams  # noqa: E402
from engine_core.serving.engine import Engine  # noqa: E402
from engine_core.serving.sequence import Sequence  # noqa: E402
from engine_core.vision import Image  # noqa: E402
from engine_core.vision.preprocess import ImageSettings, PatchSettings, preprocess  # noqa: E402
from engine_core.vision.prompt import PlacedImage  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "vision.jsonl"
CONTEXT = 2048
QUESTIONS = ("What is on the table?", "Which of them is closest to the edge?")
WEIGHTS = {"onnxruntime": ["fp32", "int8"], "cuda": ["fp16"]}


def picture(seed: int) -> Image:
    small = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return Image(np.repeat(np.repeat(small, 10, axis=0), 10, axis=1))


class EngineRuns:
    """An engine that answers questions."""

    def __init__(self, directory: Path, image_tokens: int, threads: int) -> None:
        config = EngineConfig(
            directory, max_image_tokens=image_tokens, num_threads=threads, max_images=1, verify_files=False
        )
        self.engine = Engine.open(config, lambda line: None)

    @property
    def settings(self) -> ImageSettings:
        """The processor's settings that the engine uses."""
        assert self.engine.images is not None
        return self.engine.images.spec.processor

    def measure(self, seed: int) -> dict[str, float]:
        image = picture(2 * seed)
        parts = self._parts(image)
        seen = self.settings.tokens(image.height, image.width)
        fresh = picture(2 * seed + 1)
        first, second = (timed(lambda text=text: self._ask(text, fresh)) for text in QUESTIONS)
        return {"image_tokens": seen, **parts, "ttft_ms": first, "second_ttft_ms": second}

    def _parts(self, image: Image) -> dict[str, float]:
        """Return what is timed apart, of an image that the engine has not seen."""
        raise NotImplementedError

    def _ask(self, text: str, image: Image) -> None:
        self.engine.answer(question(text, (image,), 1))


class CpuRuns(EngineRuns):
    """The encoder is there once more to be timed alone."""

    def __init__(self, directory: Path, image_tokens: int, threads: int) -> None:
        from engine_core.backends.onnxruntime.encoder import Encoder, encoder_options

        super().__init__(directory, image_tokens, threads)
        assert self.engine.images is not None
        self._spec = self.engine.images.spec
        options = encoder_options(threads, is_int8=self.engine.manifest.quantization != "fp32")
        self._encoder = Encoder(directory, self._spec, 1, options)
        self._encoder.warm_up()

    def _parts(self, image: Image) -> dict[str, float]:
        import onnxruntime as ort

        count = self.settings.tokens(image.height, image.width)
        out = np.empty((count, self._spec.feature_size), np.float32)
        placed = PlacedImage(image, np.arange(count, dtype=np.int32))
        prepare = timed(lambda: preprocess(image, self.settings))
        whole = timed(lambda: self._encoder.take(placed, 0, count, out, ort.RunOptions()))
        return {"prepare_ms": prepare, "encode_ms": whole - prepare}


class CudaRuns(EngineRuns):
    """The backend's own steps are timed, each until the GPU is done."""

    def _parts(self, image: Image) -> dict[str, float]:
        prepared = self.engine.prepare(question(QUESTIONS[0], (image,), 1))
        backend: Any = self.engine._backend  # the engine has no request at this time
        encoder, (placed,) = backend.encoder, prepared.images
        backend.begin(0, prepared.sampling, prepared.token_ids, "", prepared.images)
        piece = partial(encoder.encode, placed, 0, placed.num_tokens)

        def prepare() -> None:
            while not encoder.is_prepared(image):
                piece()

        def encode() -> None:
            while not piece():
                pass
            backend._stream.wait()

        prompt = SequenceStep(0, prepared.token_ids)
        return {
            "prepare_ms": timed(prepare),
            "encode_ms": timed(encode),
            "prefill_ms": timed(lambda: backend.step([prompt])[0].result()),
        }


def question(text: str, images: tuple[Image, ...], num_tokens: int) -> GenerationRequest:
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    return GenerationRequest("", (ChatMessage("user", text),), images=images, sampling=sampling)


class BesideRuns:
    """An engine with two slots: a text is answered in one while an image is seen in the other."""

    def __init__(self, directory: Path, image_tokens: int, threads: int) -> None:
        config = EngineConfig(
            directory, max_image_tokens=image_tokens, num_threads=threads, max_images=1, max_batch=2, verify_files=False
        )
        self.engine = Engine.open(config, lambda line: None)

    def measure(self, image: Image) -> dict[str, float]:
        text = self._add(question(QUESTIONS[0], (), CONTEXT // 2))
        self._token_times(text, lambda: text.num_sampled >= 2)
        alone = self._token_times(text, lambda: text.num_sampled >= 12)
        start, seen = time.perf_counter(), self._add(question(QUESTIONS[0], (image,), 1))
        beside = self._token_times(text, lambda: seen.num_sampled >= 1)
        first = (time.perf_counter() - start) * 1e3
        text.cancel.cancel(FinishReason.CANCELLED)
        while self.engine.scheduler.has_work:
            self.engine.step()
        return {"gap_ms": max(beside), "token_ms": statistics.median(alone), "beside_ttft_ms": first}

    def _add(self, request: GenerationRequest) -> Sequence:
        sequence = Sequence(
            self.engine.prepare(request), self.engine.tokenizer, on_piece=None, on_done=lambda result: None
        )
        self.engine.scheduler.add(sequence)
        return sequence

    def _token_times(self, text: Sequence, is_over: Callable[[], bool]) -> list[float]:
        """Step until ``is_over``; return the milliseconds between the tokens of ``text``."""
        times, count, last = [], text.num_sampled, time.perf_counter()
        while not is_over():
            self.engine.step()
            if text.num_sampled > count:
                count, now = text.num_sampled, time.perf_counter()
                times.append((now - last) * 1e3)
                last = now
        return times


class ReferenceRuns:
    """transformers, with pictures prepared within the same limit."""

    def __init__(
        self, shape: VisionShape, checkpoint: Path, settings: ImageSettings, threads: int, device: str
    ) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch, self._shape, self._device = torch, shape, device
        self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(checkpoint))
        if isinstance(settings, PatchSettings):
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            limits = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
            self._processor: Any = Qwen2VLImageProcessorPil(**PATCHES | limits)
        else:
            from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

            edges = {"size": {"longest_edge": settings.longest_edge}, "max_image_size": {"longest_edge": TILE}}
            self._processor = transformers.Idefics3Processor(
                Idefics3ImageProcessorPil(**edges), self._tokenizer, image_seq_len=TILE_TOKENS,
                chat_template=shape.template,
            )  # fmt: skip
        self._is_patches = isinstance(settings, PatchSettings)
        dtype = torch.float32 if device == "cpu" else torch.float16
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            str(checkpoint), dtype=dtype, attn_implementation="sdpa"
        )
        self._model = model.eval().to(device)

    def measure(self, seed: int) -> dict[str, float]:
        image = picture(2 * seed)
        inputs: dict[str, Any] = {}
        prepare = timed(lambda: inputs.update(self._inputs(image)))
        encode = timed(lambda: self._encode(inputs))
        whole = timed(lambda: self._ask(self._inputs(image)))
        return {
            "prepare_ms": prepare, "encode_ms": encode, "prefill_ms": max(0.0, whole - prepare - encode),
            "ttft_ms": whole,
        }  # fmt: skip

    def _inputs(self, image: Image) -> dict[str, Any]:
        conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
        options = {"input_data_format": "channels_last"}
        if not self._is_patches:
            text = self._processor.apply_chat_template(conversation, add_generation_prompt=True)
            found = dict(self._processor(text=text, images=[image.pixels], images_kwargs=options, return_tensors="pt"))
        else:  # what its processor does, which needs torchvision
            found = dict(self._processor([image.pixels], return_tensors="pt", **options))
            text = self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            count = int(found["image_grid_thw"].prod()) // PATCHES["merge_size"] ** 2
            text = text.replace(self._shape.placeholder, self._shape.placeholder * count)
            ids = self._torch.tensor([self._tokenizer.encode(text, add_special_tokens=False)])
            image_id = self._shape.config["image_token_id"]
            found |= {"input_ids": ids, "mm_token_type_ids": (ids == image_id).long()}
        return {name: values.to(self._device) for name, values in found.items()}

    def _encode(self, inputs: dict[str, Any]) -> None:
        more = "image_grid_thw" if self._is_patches else "pixel_attention_mask"
        with self._torch.no_grad():
            self._model.model.get_image_features(inputs["pixel_values"], inputs[more])
        self._wait()

    def _ask(self, inputs: dict[str, Any]) -> None:
        with self._torch.no_grad():
            self._model(**inputs, logits_to_keep=1).logits[0, -1].argmax().item()

    def _wait(self) -> None:
        if self._device != "cpu":
            self._torch.cuda.synchronize()


def timed(work: Callable[[], None]) -> float:
    """Return the milliseconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def machine(backend: str) -> str:
    if backend == "cuda":
        from benchmarks.gpu_decode import gpu_name

        return gpu_name()
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def build(backend: str, checkpoint: Path, directory: Path, weights: str, name: str) -> None:
    if backend == "cuda":
        from engine_core.backends.cuda.build import build_cuda

        build_cuda(checkpoint, directory, quantization=weights, max_context=CONTEXT, model_name=name, dtype="fp16")
        return
    from engine_core.backends.onnxruntime.build import build_engine

    build_engine(checkpoint, directory, quantization=weights, max_context=CONTEXT, model_name=name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--backend", choices=WEIGHTS, default="onnxruntime")
    parser.add_argument("--shape", choices=SHAPES, default="smolvlm-256m")
    parser.add_argument("--weights", nargs="+")
    parser.add_argument("--image-tokens", type=int, help="of a picture, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--beside", action="store_true")
    options = parser.parse_args()
    shape, backend = SHAPES[options.shape], options.backend
    image_tokens = options.image_tokens or shape.image_tokens
    checkpoint = options.directory / options.shape
    if not (checkpoint / "model.safetensors").is_file():
        shape.write(checkpoint)
    runs: dict[str, EngineRuns | ReferenceRuns] = {}
    beside: dict[str, BesideRuns] = {}
    kind = CudaRuns if backend == "cuda" else CpuRuns
    for weights in options.weights or WEIGHTS[backend]:
        directory = options.directory / f"{options.shape}-{backend}-{weights}"
        if not directory.is_dir():
            build(backend, checkpoint, directory, weights, shape.name)
        runs[weights] = kind(directory, image_tokens, options.threads)
        if options.beside:
            beside[weights] = BesideRuns(directory, image_tokens, options.threads)
    if options.reference:
        settings = next(each.settings for each in runs.values() if isinstance(each, EngineRuns))
        device = "cuda" if backend == "cuda" else "cpu"
        runs["transformers"] = ReferenceRuns(shape, checkpoint, settings, options.threads, device)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, each in runs.items():
            values = each.measure(repeat)
            if name in beside:
                values |= beside[name].measure(picture(2 * repeat))
            if repeat:  # the first of each warms up
                found[name].append(values)
    facts = {
        "date": datetime.date.today().isoformat(), "machine": machine(backend),
        "load_average": round(os.getloadavg()[1], 1), "threads": options.threads,
    }  # fmt: skip
    digits = 2 if backend == "cuda" else 1
    with open(RESULTS, "a", encoding="utf-8") as file:
        for name, values in found.items():
            row = {key: round(statistics.median(each[key] for each in values), digits) for key in values[0]}
            row.setdefault("prefill_ms", round(row["ttft_ms"] - row["encode_ms"] - row["prepare_ms"], digits))
            row["second_ttft_ms"] = row.get("second_ttft_ms", row["ttft_ms"])
            row["image_tokens"] = int(row.get("image_tokens", image_tokens))
            kinds = (backend, name)
            if name == "transformers":
                kinds = ("transformers", "fp16" if backend == "cuda" else "fp32")
            whole = {**facts, "backend": kinds[0], "model": shape.name, "weights": kinds[1], **row}
            print(json.dumps(whole))
            file.write(json.dumps(whole) + "\n")
    for each in (*runs.values(), *beside.values()):
        if not isinstance(each, ReferenceRuns):
            each.engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
