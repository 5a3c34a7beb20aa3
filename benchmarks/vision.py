"""Time the first token after an image, and after a second question on the same one, beside transformers.

    python3 benchmarks/vision.py DIR [--weights fp32 int8] [--image-tokens 64] [--threads 2] [--repeats 3] [--reference]
                                 [--beside]

Writes a checkpoint of the shape of SmolVLM-256M with random weights to DIR/checkpoint, and an engine for each of
``--weights`` beside it, unless they are there. Each repeat takes a new random picture of 640 x 480 pixels, so that
nothing is known of it, and asks one question and then another. ``--reference`` asks transformers (torch, float32, as
many threads) the first question in the same turns. A row of medians for each goes to benchmarks/results/vision.jsonl:

- encode_ms: the encoder and the projector, with the resizing of the picture before. prefill_ms: the rest of ttft_ms.
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
from pathlib import Path

import numpy as np
import onnxruntime as ort

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.vision_template import TEMPLATE  # noqa: E402
from engine_core.backends.onnxruntime.build import build_engine  # noqa: E402
from engine_core.backends.onnxruntime.encoder import Encoder, encoder_options  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.measure.random_checkpoint import write_random_checkpoint  # noqa: E402
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, SamplingParams  # noqa: E402
from engine_core.serving.engine import Engine  # noqa: E402
from engine_core.serving.sequence import Sequence  # noqa: E402
from engine_core.vision import Image  # noqa: E402
from engine_core.vision.prompt import PlacedImage  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "vision.jsonl"
CONTEXT, TILE, TILE_TOKENS = 2048, 512, 64
QUESTIONS = ("What is on the table?", "Which of them is closest to the edge?")
SPECIAL = (
    "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip
CONFIG = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "model_type": "idefics3",
    "image_token_id": 256 + SPECIAL.index("<image>"),
    "scale_factor": 4,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "eos_token_id": 257,
    },
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": TILE, "patch_size": 16,
    },
}  # fmt: skip


def write_checkpoint(directory: Path) -> None:
    """Write the checkpoint with a tokenizer of bytes and the processor's files."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    processor = {
        "image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 4 * TILE},
        "max_image_size": {"longest_edge": TILE},
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    (directory / "processor_config.json").write_text(json.dumps({"image_seq_len": TILE_TOKENS}), encoding="utf-8")
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end_of_utterance>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(directory))
    write_random_checkpoint(directory, CONFIG)


def picture(seed: int) -> Image:
    small = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return Image(np.repeat(np.repeat(small, 10, axis=0), 10, axis=1))


class EngineRuns:
    """The engine, and the encoder once more to be timed alone."""

    def __init__(self, directory: Path, image_tokens: int, threads: int) -> None:
        config = EngineConfig(
            directory, max_image_tokens=image_tokens, num_threads=threads, max_images=1, verify_files=False
        )
        self.engine = Engine.open(config, lambda line: None)
        assert self.engine.images is not None
        options = encoder_options(threads, is_int8=self.engine.manifest.quantization != "fp32")
        self._encoder = Encoder(directory, self.engine.images.spec, 1, options)
        self._encoder.warm_up()

    def measure(self, image: Image) -> dict[str, float]:
        count = self.engine.images.spec.processor.tokens(image.height, image.width)  # type: ignore[union-attr]
        out = np.empty((count, self.engine.manifest.model.hidden_size), np.float32)
        placed = PlacedImage(image, np.arange(count, dtype=np.int32))
        encode = timed(lambda: self._encoder.take(placed, 0, count, out, ort.RunOptions()))
        first, second = (timed(lambda text=text: self._ask(text, image)) for text in QUESTIONS)
        return {"image_tokens": count, "encode_ms": encode, "ttft_ms": first, "second_ttft_ms": second}

    def _ask(self, text: str, image: Image) -> None:
        self.engine.answer(question(text, (image,), 1))


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

    def __init__(self, checkpoint: Path, longest_edge: int, threads: int) -> None:
        import torch
        import transformers
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        torch.set_num_threads(threads)
        self._torch = torch
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(checkpoint))
        images = Idefics3ImageProcessorPil(size={"longest_edge": longest_edge}, max_image_size={"longest_edge": TILE})
        self._processor = transformers.Idefics3Processor(
            images, tokenizer, image_seq_len=TILE_TOKENS, chat_template=TEMPLATE
        )
        self._model = transformers.AutoModelForImageTextToText.from_pretrained(
            str(checkpoint), dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def measure(self, image: Image) -> dict[str, float]:
        encode = timed(lambda: self._encode(image))
        return {"encode_ms": encode, "ttft_ms": timed(lambda: self._ask(image))}

    def _inputs(self, image: Image):
        conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
        text = self._processor.apply_chat_template(conversation, add_generation_prompt=True)
        options = {"input_data_format": "channels_last"}
        return self._processor(text=text, images=[image.pixels], images_kwargs=options, return_tensors="pt")

    def _encode(self, image: Image) -> None:
        inputs = self._inputs(image)
        with self._torch.no_grad():
            self._model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])

    def _ask(self, image: Image) -> None:
        with self._torch.no_grad():
            self._model(**self._inputs(image), logits_to_keep=1)


def timed(work: Callable[[], None]) -> float:
    """Return the milliseconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def machine() -> str:
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--weights", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--image-tokens", type=int, default=TILE_TOKENS, help="of a picture, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--beside", action="store_true")
    options = parser.parse_args()
    checkpoint = options.directory / "checkpoint"
    if not (checkpoint / "model.safetensors").is_file():
        write_checkpoint(checkpoint)
    runs: dict[str, EngineRuns | ReferenceRuns] = {}
    beside: dict[str, BesideRuns] = {}
    for weights in options.weights:
        directory = options.directory / weights
        if not directory.is_dir():
            build_engine(
                checkpoint, directory, quantization=weights, max_context=CONTEXT, model_name="SmolVLM-256M shape"
            )
        runs[weights] = EngineRuns(directory, options.image_tokens, options.threads)
        if options.beside:
            beside[weights] = BesideRuns(directory, options.image_tokens, options.threads)
    if options.reference:
        engine = next(each.engine for each in runs.values() if isinstance(each, EngineRuns))
        assert engine.images is not None
        longest = engine.images.spec.processor.longest_edge  # type: ignore[union-attr]
        runs["transformers"] = ReferenceRuns(checkpoint, longest, options.threads)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, each in runs.items():
            values = each.measure(picture(repeat))
            if name in beside:
                values |= beside[name].measure(picture(repeat))
            if repeat:  # the first of each warms up
                found[name].append(values)
    facts = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "load_average": round(os.getloadavg()[1], 1),
        "threads": options.threads,
    }  # fmt: skip
    with open(RESULTS, "a", encoding="utf-8") as file:
        for name, values in found.items():
            row = {key: round(statistics.median(each[key] for each in values), 1) for key in values[0]}
            row["prefill_ms"] = round(row["ttft_ms"] - row["encode_ms"], 1)
            row["second_ttft_ms"] = row.get("second_ttft_ms", row["ttft_ms"])
            row["image_tokens"] = int(row.get("image_tokens", options.image_tokens))
            backend, kind = ("transformers", "fp32") if name == "transformers" else ("onnxruntime", name)
            whole = {**facts, "backend": backend, "model": "SmolVLM-256M shape", "weights": kind, **row}
            print(json.dumps(whole))
            file.write(json.dumps(whole) + "\n")
    for each in (*runs.values(), *beside.values()):
        if not isinstance(each, ReferenceRuns):
            each.engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
