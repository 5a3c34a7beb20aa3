"""Trains the demo model that sees from nothing and writes a checkpoint in the layout of SmolVLM.

    python -m tools.demo_vision.train --out models/demo_vision --minutes 5 --compile     # one GPU; all of it ends within 5 minutes
    python -m tools.demo_vision.train --out /tmp/more --start models/demo_vision --lr 5e-4 --compile   # trains a checkpoint further
    python -m tools.demo_vision.train --out /tmp/tiny --tiny                    # a few steps on the CPU: does it run?

``--workers`` processes draw scenes and questions; pictures are rendered on the device that trains. A row is one picture and as many
dialogues about it as fit; a mask lets each dialogue see the picture and itself. Where the workers are slower than the device, batches
are used again with other noise. During training only, the patches of the encoder's output also tell which object they show: its shape,
its colour and where its centre is.
Every minute the answers to held-out questions are counted by kind (each token given the right ones before it), and the best checkpoint
is kept. The schedule follows the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import GenerationConfig, LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

from tools.demo_vision.questions import (
    HELD_OUT_SEED,
    NO_PICTURE,
    SYSTEM_PROMPTS,
    Asker,
    Example,
    dialogue,
    held_out_examples,
    is_right,
)
from tools.demo_vision.render import render_rows
from tools.demo_vision.rows import IGNORED, Packer, labels_of
from tools.demo_vision.scene import MAX_OBJECTS, OBJECT, random_scene, row_of
from tools.demo_vision.tokenizer import END, IMAGE, PAD, START, save_processor, train_tokenizer
from tools.demo_vision.words import COLOURS, SHAPES

NO_PICTURE_SHARE = 0.02
FINER = 2  # pictures are rendered so many times as large


# ---- rows of tokens, made by the workers


class Batches(IterableDataset):
    """Endless batches: scenes float32 [rows, ROW], objects int16, tokens int16 [rows, 4, length], place of the picture int16 [rows]."""

    def __init__(self, tokenizer: Tokenizer, rows: int, length: int, image_tokens: int, seed: int) -> None:
        self.tokenizer, self.rows, self.length, self.image_tokens, self.seed = tokenizer, rows, length, image_tokens, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        rng = Random(self.seed + (worker.id if worker else 0))
        packer = Packer(self.tokenizer, self.length, self.image_tokens)
        while True:
            scenes, objects, tokens, places = [], [], [], []
            for _ in range(self.rows):
                scene = random_scene(rng)
                picture = rng.random() >= NO_PICTURE_SHARE
                packer.begin(rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else "", picture)
                asker = Asker(rng, scene)
                while packer.add([(turn.question, turn.answer if picture else NO_PICTURE) for turn in dialogue(asker)]):
                    pass
                scenes.append(row_of(scene))
                objects.append(labels_of(scene))
                tokens.append(packer.row)
                places.append(packer.image_at)
            yield (torch.from_numpy(np.stack(scenes)), torch.from_numpy(np.stack(objects)), torch.from_numpy(np.stack(tokens)),
                   torch.tensor(places, dtype=torch.int16))  # fmt: skip


# ---- pictures, on the device


class Renderer:
    """Renders batches of scenes in chunks; compiled if asked for and if that works."""

    def __init__(self, size: int, patch: int, chunk: int, compiled: bool) -> None:
        self.size, self.patch, self.chunk = size, patch, chunk
        self._render = torch.compile(render_rows, dynamic=False) if compiled else render_rows

    def _chunk(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        side = self.size * FINER
        try:
            return self._render(rows, side, side)
        except Exception as error:  # whatever the compiler raises, the uncompiled renderer does the same
            if self._render is render_rows:
                raise
            print(f"rendering without the compiler: {type(error).__name__}: {str(error)[:300]}", flush=True)
            self._render = render_rows
            return self._render(rows, side, side)

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [batch, 3, size, size] and the object at the middle of each patch, int8 [batch, patches]."""
        pictures, owners = [], []
        for part in rows.split(self.chunk):
            missing = self.chunk - len(part)
            large, owner = self._chunk(F.pad(part, (0, 0, 0, missing)) if missing else part)
            area = F.avg_pool2d(large, FINER)
            cubic = F.interpolate(large, scale_factor=1 / FINER, mode="bicubic", antialias=True).clamp(0, 1)
            which = torch.arange(len(large), device=rows.device) % 2
            small = torch.where(which[:, None, None, None] == 0, area, cubic)
            middle = FINER * self.patch // 2
            owners.append(owner[: len(part), middle :: 2 * middle, middle :: 2 * middle].flatten(1).to(torch.int8))
            pictures.append((small[: len(part)] * 255).round().to(torch.uint8))
        return torch.cat(pictures), torch.cat(owners)


def camera_noise(pictures: Tensor) -> Tensor:
    """Float pictures of -1 to 1 out of uint8 ones, each with its own exposure, contrast, sharpness and noise."""
    x = pictures.float() / 255
    batch = (len(x), 1, 1, 1)

    def uniform(low: float, high: float, shape: tuple[int, ...] = batch) -> Tensor:
        return torch.rand(shape, device=x.device) * (high - low) + low

    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + (blurred - x) * uniform(-0.5, 0.9)
    x = x.clamp(1e-3, 1) ** uniform(0.85, 1.2)
    x = (x - 0.5) * uniform(0.85, 1.12) + 0.5 + uniform(-0.06, 0.06) + uniform(-0.02, 0.02, (len(x), 3, 1, 1))
    x = x + torch.randn_like(x) * (uniform(-0.03, 0.04).clamp_min(0))
    return (x.clamp(0, 1) - 0.5) / 0.5


# ---- the model


class Trainee(nn.Module):
    """The model, run on packed rows, and the heads that only training has."""

    def __init__(self, model: SmolVLMForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.shape, self.colour, self.centre = nn.Linear(width, len(SHAPES) + 1), nn.Linear(width, len(COLOURS) + 1), nn.Linear(width, 2)

    def see(self, pixels: Tensor) -> Tensor:
        """The encoder's output [batch, patches, width]."""
        vision = self.model.model.vision_model
        hidden = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + vision.embeddings.position_embedding.weight
        for layer in vision.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        return vision.post_layernorm(hidden)

    def read(self, seen: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] at the text's tokens."""
        features = self.model.model.connector(seen)
        text = self.model.model.text_model
        ids, _, documents, positions = tokens.unbind(1)
        hidden = torch.cat([features.to(torch.float32), text.embed_tokens(ids)], 1)
        count = features.shape[1]
        steps = torch.arange(count, device=ids.device)
        documents = torch.cat([torch.where(places[:, None] >= 0, 0, -1).expand(-1, count), documents], 1)
        positions = torch.cat([places.clamp_min(0)[:, None] + steps, positions], 1)
        mine = (documents[:, :, None] == documents[:, None, :]) | (documents[:, None, :] == 0)
        seen_by = mine & (positions[:, None, :] <= positions[:, :, None]) & (documents[:, None, :] >= 0)
        seen_by = seen_by | torch.eye(documents.shape[1], dtype=torch.bool, device=ids.device)
        dtype = torch.bfloat16 if torch.is_autocast_enabled(ids.device.type) else torch.float32
        mask = torch.zeros(seen_by.shape, dtype=dtype, device=ids.device).masked_fill(~seen_by, torch.finfo(dtype).min)[:, None]
        rotary = text.rotary_emb(hidden, positions)
        for layer in text.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return self.model.lm_head(text.norm(hidden[:, count:]))

    def forward(
        self, pixels: Tensor, tokens: Tensor, places: Tensor, owners: Tensor, objects: Tensor, centres: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of the answers and the loss of the heads."""
        seen = self.see(pixels)
        logits = self.read(seen, tokens, places)
        answers = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1, 1:].flatten(), ignore_index=IGNORED)
        there = owners >= 0
        index = owners.clamp_min(0)
        shapes = torch.where(there, objects[..., 0].gather(1, index) + 1, 0)
        colours = torch.where(there, objects[..., 1].gather(1, index) + 1, 0)
        side = int(seen.shape[1] ** 0.5)
        patch = torch.arange(side * side, device=seen.device)
        own = torch.stack([(patch % side + 0.5) / side, (patch // side + 0.5) / side], -1)
        offset = (centres.gather(1, index[..., None].expand(-1, -1, 2)) - own) * 10
        weight = there.float()
        error = F.smooth_l1_loss(self.centre(seen).float(), offset, reduction="none", beta=0.1).sum(-1)
        heads = (
            F.cross_entropy(self.shape(seen).flatten(0, 1).float(), shapes.flatten())
            + F.cross_entropy(self.colour(seen).flatten(0, 1).float(), colours.flatten())
            + (error * weight).sum() / weight.sum().clamp_min(1)
        )
        return answers, heads


def build_model(tokenizer: Tokenizer, args: argparse.Namespace) -> SmolVLMForConditionalGeneration:
    if args.start:
        return SmolVLMForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    start, pad, end = (tokenizer.token_to_id(token) for token in (START, PAD, END))
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=max(1, args.hidden // 128), head_dim=64, max_position_embeddings=1024,
        rms_norm_eps=1e-5, attention_bias=False, tie_word_embeddings=True, bos_token_id=start, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    vision = {
        "hidden_size": args.vision_hidden, "intermediate_size": 4 * args.vision_hidden, "num_hidden_layers": args.vision_layers,
        "num_attention_heads": args.vision_hidden // 64, "image_size": args.image_size, "patch_size": args.patch,
    }  # fmt: skip
    return SmolVLMForConditionalGeneration(SmolVLMConfig(
        text_config=text.to_dict(), vision_config=vision, scale_factor=args.scale, image_token_id=tokenizer.token_to_id(IMAGE),
        tie_word_embeddings=True, pad_token_id=pad,
    ))  # fmt: skip


def export(model: SmolVLMForConditionalGeneration, state: dict[str, Tensor], tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Write the checkpoint (bfloat16) with the weights ``state``, and the tokenizer's and the processor's files."""
    args.out.mkdir(parents=True, exist_ok=True)
    model.load_state_dict(state)
    model.to("cpu", torch.bfloat16).eval()
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=256, eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(args.out)
    save_processor(tokenizer, args.out, args.image_size, args.image_tokens)


# ---- held-out questions


class HeldOut:
    """Held-out examples as rows, and the share of them that the model answers rightly, by kind."""

    def __init__(
        self, examples: dict[str, list[Example]], tokenizer: Tokenizer, renderer: Renderer, device: torch.device, args: argparse.Namespace
    ) -> None:
        packer = Packer(tokenizer, args.length, args.image_tokens)
        self.tokenizer, self.device = tokenizer, device
        self.examples = [(held_out, example) for held_out, some in examples.items() for example in some]
        tokens, places, self.spans, rows = [], [], [], []
        for _, example in self.examples:
            packer.begin("", True)
            turns = [(turn.question, turn.answer) for turn in example.turns]
            packer.add(turns[:-1] + [(turns[-1][0], "")])
            question_end = packer.used - 1  # without the END of the empty answer
            packer.begin("", True)
            assert packer.add(turns), "a held-out dialogue is longer than a row"
            self.spans.append((question_end, packer.used))
            tokens.append(packer.row)
            places.append(packer.image_at)
            rows.append(row_of(example.scene))
        self.tokens, self.places = torch.from_numpy(np.stack(tokens)), torch.tensor(places)
        self.pictures = torch.cat([renderer(part.to(device))[0] for part in torch.from_numpy(np.stack(rows)).split(256)])

    @torch.no_grad()
    def accuracy(self, trainee: Trainee, batch: int = 256) -> dict[str, dict[str, float]]:
        right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        self.wrong: list[tuple[str, str, str, str]] = []
        trainee.eval()
        for start in range(0, len(self.examples), batch):
            span = slice(start, start + batch)
            pixels = (self.pictures[span].float() / 255 - 0.5) / 0.5
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = trainee.read(trainee.see(pixels), self.tokens[span].to(self.device).long(), self.places[span].to(self.device))
            best = logits.argmax(-1).cpu()
            for i, row in enumerate(best, start):
                held_out, example = self.examples[i]
                begin, end = self.spans[i]
                ids = row[begin - 1 : end - 1].tolist()  # what follows the question's last token, and so on
                turn = example.turns[-1]
                found = self.tokenizer.decode(ids[:-1], skip_special_tokens=False)
                fine = ids[-1] == self.tokenizer.token_to_id(END) and is_right(turn.answer, found)
                right[held_out][turn.kind].append(fine)
                right[held_out]["all"].append(fine)
                if not fine:
                    self.wrong.append((held_out, turn.question, turn.answer, found))
        trainee.train()
        return {held_out: {kind: round(sum(some) / len(some), 4) for kind, some in kinds.items()} for held_out, kinds in right.items()}


# ---- training


def learning_rate(progress: float, peak: float) -> float:
    """Linear over the first 3 %, then a cosine to a hundredth."""
    if progress < 0.03:
        return peak * max(progress / 0.03, 1e-3)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.03) / 0.97))))


def measured(call: Callable[[], object], times: int = 5) -> float:
    """Seconds that ``call`` takes on the GPU."""
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.monotonic() - start) / times


class Feed:
    """Batches on the device: the next new one if the workers have one, else one of the last ``--keep`` again."""

    def __init__(self, loader: Iterator, renderer: Renderer, device: torch.device, args: argparse.Namespace) -> None:
        self._renderer, self._device, self._keep, self._reuse = renderer, device, args.keep, args.workers > 0
        self._kept: list[tuple[Tensor, ...]] = []
        self._rng = Random(0)
        self.every, self._calls = 1, 0  # a new batch is taken at every such step at most
        self._waiting: queue.Queue = queue.Queue(8)
        self.new = 0
        threading.Thread(target=self._pull, args=(loader,), daemon=True).start()

    def _pull(self, loader: Iterator) -> None:
        for batch in loader:
            self._waiting.put(batch)

    def next(self) -> tuple[Tensor, ...]:
        """Pictures uint8, tokens, places, owners, objects, centres."""
        self._calls += 1
        if self._reuse and self._calls % self.every and len(self._kept) >= 8:
            return self._rng.choice(self._kept)
        try:
            rows, objects, tokens, places = self._waiting.get(block=len(self._kept) < 8 or not self._reuse)
        except queue.Empty:
            return self._rng.choice(self._kept)
        rows = rows.to(self._device, non_blocking=True)
        pictures, owners = self._renderer(rows)
        centres = rows[:, -MAX_OBJECTS * OBJECT :].unflatten(1, (MAX_OBJECTS, OBJECT))[..., 3:5].contiguous()
        batch = pictures, tokens.to(self._device), places.to(self._device), owners, objects.to(self._device), centres
        self.new += 1
        if len(self._kept) >= self._keep:
            self._kept[self._rng.randrange(self._keep)] = batch
        else:
            self._kept.append(batch)
        return batch


def train(tokenizer: Tokenizer, held: HeldOut, renderer: Renderer, device: torch.device, started: float, args: argparse.Namespace) -> None:
    """Train until the time is over; keep the best checkpoint in ``args.out``."""
    model = build_model(tokenizer, args)
    parameters = model.num_parameters()
    print(f"{parameters:,} parameters, vocabulary {tokenizer.get_vocab_size()}, {args.image_tokens} tokens a picture", flush=True)
    trainee = Trainee(model).to(device).train()
    matrices = [p for p in trainee.parameters() if p.dim() > 1]
    vectors = [p for p in trainee.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98), fused=True
    )
    batches = Batches(tokenizer, args.rows, args.length, args.image_tokens, args.seed)
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers, prefetch_factor=4 if args.workers else None)
    feed = Feed(iter(loader), renderer, device, args)
    rendered = torch.from_numpy(np.stack([row_of(random_scene(Random(i))) for i in range(args.rows)])).to(device)
    forward = torch.compile(trainee, dynamic=False) if args.compile else trainee
    best, best_state = -1.0, model.state_dict()
    figures: dict[str, object] = {}
    deadline = started + 60 * args.minutes - args.reserve  # the last evaluation and the export come after it
    begin, evaluated, step = time.monotonic(), time.monotonic(), 0

    def evaluate(final: bool = False) -> None:
        nonlocal best, best_state
        accuracy = held.accuracy(trainee)
        known = accuracy["scenes"]["all"] + accuracy["pairs"]["all"]
        if known > best:
            best, best_state = known, {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
            figures.update(accuracy=accuracy, best_step=step)
        print(json.dumps({"minute": round((time.monotonic() - started) / 60, 2), "step": step, "accuracy": accuracy}), flush=True)
        if final:
            for wrong in Random(0).sample(held.wrong, min(args.show, len(held.wrong))):
                print(json.dumps(dict(zip(("new", "question", "expected", "found"), wrong))), flush=True)

    while True:
        if step == 3:  # compiled and warm: the clock starts here
            begin = evaluated = time.monotonic()
            print(f"warm after {begin - started:.0f} s", flush=True)
        if step == 40 and torch.cuda.is_available():  # rendering takes at most half of the time
            rendering, training = measured(lambda: renderer(rendered)), (time.monotonic() - begin) / 37
            feed.every = max(1, math.ceil(rendering / training))
            print(
                f"{1e3 * rendering:.1f} ms to render a batch, {1e3 * training:.1f} ms a step: new pictures every {feed.every} steps",
                flush=True,
            )
        now = time.monotonic()
        progress = 0.0 if step < 3 else max(step / args.steps if args.steps else 0.0, (now - begin) / max(1.0, deadline - begin))
        if progress >= 1 or now >= deadline:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        pictures, tokens, places, owners, objects, centres = feed.next()
        inputs = camera_noise(pictures), tokens.long(), places.long(), owners.long(), objects.long(), centres
        with torch.autocast(device.type, torch.bfloat16):
            try:
                answers, heads = forward(*inputs)
            except Exception as error:  # a compiler that fails costs speed, not the run
                if step or forward is trainee:
                    raise
                print(f"training without the compiler: {type(error).__name__}: {str(error)[:300]}", flush=True)
                forward = trainee
                answers, heads = forward(*inputs)
        (answers + args.heads_weight * heads).backward()
        norm = nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every == 0:
            seconds = time.monotonic() - begin
            figures |= {"steps": step, "loss": round(answers.item(), 4), "heads_loss": round(heads.item(), 4), "norm": round(norm.item(), 2),
                        "seconds": round(seconds, 1), "pictures_per_second": round(step * args.rows / seconds), "new_batches": feed.new}  # fmt: skip
            print(json.dumps({k: v for k, v in figures.items() if k != "accuracy"}), flush=True)
        if time.monotonic() - evaluated > args.evaluate_every:
            evaluate()
            evaluated = time.monotonic()
    evaluate(final=True)
    export(model, best_state, tokenizer, args)
    figures |= {"parameters": parameters, "minutes": round((time.monotonic() - started) / 60, 2), "new_pictures": feed.new * args.rows,
                "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"}}  # fmt: skip
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"done after {time.monotonic() - started:.0f} s", flush=True)
    os._exit(0)  # the workers and the thread that waits for them hold nothing worth an orderly end


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a checkpoint to train further, with its sizes and its tokenizer; not with --tiny")
    parser.add_argument("--minutes", type=float, default=5.0, help="limit of the whole program")
    parser.add_argument("--reserve", type=float, default=12.0, help="seconds of it for the last evaluation and the export")
    parser.add_argument("--steps", type=int, default=0, help="0: until the time is over")
    parser.add_argument("--rows", type=int, default=256, help="pictures in a batch")
    parser.add_argument("--length", type=int, default=256, help="text tokens in a row")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--heads-weight", type=float, default=0.3)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vision-hidden", type=int, default=192)
    parser.add_argument("--vision-layers", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--scale", type=int, default=2, help="pixel shuffle")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--keep", type=int, default=1000, help="batches kept for use again")
    parser.add_argument("--chunk", type=int, default=64, help="pictures rendered at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-scenes", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=100, help="questions of each kind of question and of held-out")
    parser.add_argument("--evaluate-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--show", type=int, default=40, help="print so many wrong answers at the end")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model, to see that all of it runs")
    args = parser.parse_args()
    if args.start:
        config = SmolVLMConfig.from_pretrained(args.start)
        args.image_size, args.patch = config.vision_config.image_size, config.vision_config.patch_size
        args.scale = config.scale_factor
    if args.tiny:
        args.steps, args.rows, args.workers, args.hidden, args.layers, args.vision_hidden, args.vision_layers = 20, 8, 1, 128, 2, 64, 2
        args.tokenizer_scenes, args.held_out, args.log_every, args.chunk, args.image_size = 300, 1, 5, 8, 64
    args.image_tokens = (args.image_size // args.patch // args.scale) ** 2
    return args


def tokenizer_of_scenes(args: argparse.Namespace) -> Tokenizer:
    rng = Random(HELD_OUT_SEED - 1)
    scenes = (random_scene(rng) for _ in range(args.tokenizer_scenes))
    texts = (
        text
        for scene in scenes
        for turn in (t for _ in range(6) for t in dialogue(Asker(rng, scene, new_kinds=True)))
        for text in (turn.question, turn.answer)
    )
    return train_tokenizer(texts, args.vocab)


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json")) if args.start else tokenizer_of_scenes(args)
    renderer = Renderer(args.image_size, args.patch, args.chunk, args.compile)
    print(f"tokenizer ready after {time.monotonic() - started:.0f} s", flush=True)
    held = HeldOut(held_out_examples(args.held_out), tokenizer, renderer, device, args)
    print(f"held-out scenes rendered after {time.monotonic() - started:.0f} s", flush=True)
    train(tokenizer, held, renderer, device, started, args)


if __name__ == "__main__":
    main()
