"""The vision part of a model as data: its encoder, its projector, and how an image becomes rows of its prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.models.fields import Fields
from engine_core.vision.preprocess import ImageSettings, Normalization, PatchSettings, TileSettings

SIGLIP, QWEN3_VL = KINDS = ("siglip", "qwen3_vl")
# How a processor writes videos.
SMOLVLM_VIDEO, QWEN3_VL_VIDEO = VIDEOS = ("smolvlm", "qwen3_vl")
ACTIVATIONS = ("gelu_tanh", "gelu")
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu": "gelu"}
_LANCZOS, _BICUBIC = 1, 3  # of Pillow
_HALVES = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class EncoderLayerNames:
    """The names of a layer's tensors in the checkpoint, without ``.weight`` and ``.bias``, of which each has both."""

    norm: str
    qkv: tuple[str, ...]  # stacked along their rows
    output: str
    mlp_norm: str
    up: str
    down: str


@dataclass(frozen=True)
class MergerNames:
    """The tensors that make tokens of merged patches: a norm, two matrices with an exact GELU between them."""

    norm: str
    up: str
    down: str
    after: int = -1  # the layer whose output it takes; -1: the last one's
    joins_first: bool = False  # the norm is over merged patches


@dataclass(frozen=True)
class VisionSpec:
    """The encoder of a model that sees. Raises ValueError for numbers that no encoder can have.

    All kinds are pre-norm layers of full attention. ``merge`` x ``merge`` neighbouring patches become one token.

    ``siglip`` (Zhai et al. 2023, arXiv 2303.15343, as Idefics3 and SmolVLM have it): square tiles, a learned position
    for each patch, and one matrix for the merged patches (pixel shuffle).
    ``qwen3_vl``: pictures of any size, learned positions interpolated to it, 2D RoPE, and mergers, of which those after
    ``deepstack`` give features that are added to the first layers of the decoder (DeepStack: Meng et al. 2024, arXiv
    2406.04334). The decoder's positions have three axes (M-RoPE).
    """

    kind: str  # one of KINDS
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int  # pixels
    positions: int  # learned positions along a side
    merge: int  # patches along a side that become one token
    out_size: int  # of the decoder's hidden states
    image_token_id: int
    processor: ImageSettings
    prefix: str  # of the encoder's tensors
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"  # one of ACTIVATIONS
    channels: int = 3
    projector: str = ""  # the matrix for merged patches; "" = there are mergers
    temporal: int = 1  # frames of a patch
    rope_theta: float = 0.0  # of the encoder's 2D RoPE; 0 = none
    deepstack: tuple[int, ...] = ()  # layers after which features are taken, for as many layers of the decoder
    # Frequencies of the decoder's RoPE that time, rows and columns turn, interleaved; () = positions have one axis.
    mrope: tuple[int, ...] = ()
    video: str = ""  # one of VIDEOS; "" = the frames of a video are shown as images
    video_token_id: int | None = None  # of the tokens of a video's frames; None = they are those of images

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.activation not in ACTIVATIONS or self.video not in ("", *VIDEOS):
            raise ValueError(f"the encoder is a {self.kind!r:.40} with {self.activation!r:.40}")
        sizes = ("hidden_size", "num_layers", "num_heads", "patch_size", "positions", "merge", "out_size", "temporal")
        if any(getattr(self, name) < 1 for name in sizes) or self.hidden_size % self.num_heads:
            raise ValueError("the encoder has sizes that do not fit each other")
        if self.kind == SIGLIP:
            # Pixels behind the last whole patch are not seen.
            if not isinstance(self.processor, TileSettings) or not self.side or self.side % self.merge:
                raise ValueError(f"its tiles have no multiple of {self.merge} patches of {self.patch_size} pixels")
            if (expected := self.processor.tile_tokens) != self.part_tokens(0):
                raise ValueError(f"its tiles have {self.part_tokens(0)} tokens, not {expected} (image_seq_len)")
        else:
            patch = (self.patch_size, self.merge, self.temporal)
            found = self.processor
            if not isinstance(found, PatchSettings) or patch != (
                found.patch_size, found.merge_size, found.temporal_size
            ):  # fmt: skip
                raise ValueError("its patches are not those of the image processor")
            if self.head_dim % 4 or any(not 0 <= layer < self.num_layers for layer in self.deepstack):
                raise ValueError("its heads or its DeepStack do not fit its layers")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def feature_size(self) -> int:
        """The values of a token: what replaces its embedding, and what the first layers of the decoder add."""
        return self.out_size * (1 + len(self.deepstack))

    # --- what one run of the encoder works on ---------------------------------------------------------

    @property
    def tile_size(self) -> int:
        """The pixels along a side of a tile."""
        assert isinstance(self.processor, TileSettings)
        return self.processor.tile_size

    @property
    def side(self) -> int:
        """The patches along a side of a tile."""
        return self.tile_size // self.patch_size

    def part_tokens(self, num_tokens: int) -> int:
        """Return the tokens that one run gives of an image of ``num_tokens``: those of a tile, or all."""
        return (self.side // self.merge) ** 2 if self.kind == SIGLIP else num_tokens

    @property
    def least_tokens(self) -> int:
        """The tokens of the smallest image."""
        return self.part_tokens(1)

    @property
    def most_tokens(self) -> int:
        """The tokens of the largest image."""
        return self.processor.most_tokens

    @property
    def most_patches(self) -> int:
        """The patches that one run of the encoder takes at most."""
        return self.part_tokens(self.most_tokens) * self.merge**2

    @property
    def patch_values(self) -> int:
        return self.channels * self.temporal * self.patch_size**2

    @property
    def pixel_bytes(self) -> int:
        """Bytes that preparing the largest image takes: its patches in float32, and scaled in bytes, three times."""
        patches = self.most_tokens * self.merge**2
        return patches * (4 * self.patch_values + 3 * self.channels * self.patch_size**2)

    @property
    def frame_token_id(self) -> int:
        """The token whose embeddings the features of a video's frames replace."""
        return self.image_token_id if self.video_token_id is None else self.video_token_id

    # --- tensors --------------------------------------------------------------------------------------

    @property
    def patch_embedding(self) -> str:
        return f"{self.prefix}{'embeddings.patch_embedding' if self.kind == SIGLIP else 'patch_embed.proj'}"

    @property
    def position_embedding(self) -> str:
        return f"{self.prefix}{'embeddings.position_embedding' if self.kind == SIGLIP else 'pos_embed'}.weight"

    @property
    def final_norm(self) -> str:
        """The norm of the last layer's output; "" = the merger has it."""
        return f"{self.prefix}post_layernorm" if self.kind == SIGLIP else ""

    @property
    def mergers(self) -> tuple[MergerNames, ...]:
        """The layers that give the features, in their order."""
        if self.kind == SIGLIP:
            return ()
        stems = [f"{self.prefix}merger."]
        stems += [f"{self.prefix}deepstack_merger_list.{index}." for index in range(len(self.deepstack))]
        after = (-1, *self.deepstack)
        return tuple(
            MergerNames(f"{stem}norm", f"{stem}linear_fc1", f"{stem}linear_fc2", layer, joins_first=layer >= 0)
            for stem, layer in zip(stems, after)
        )

    def features_after(self, layer: int) -> list[int]:
        """Return the parts of a token's features, of ``out_size`` values each, that are taken after a layer."""
        last = self.num_layers - 1
        layers = [last if merger.after < 0 else merger.after for merger in self.mergers] or [last]
        return [place for place, each in enumerate(layers) if each == layer]

    def layer(self, index: int) -> EncoderLayerNames:
        if self.kind == SIGLIP:
            stem = f"{self.prefix}encoder.layers.{index}."
            qkv = tuple(f"{stem}self_attn.{part}_proj" for part in "qkv")
            rest = ("layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")
        else:
            stem = f"{self.prefix}blocks.{index}."
            qkv = (f"{stem}attn.qkv",)
            rest = ("norm1", "attn.proj", "norm2", "mlp.linear_fc1", "mlp.linear_fc2")
        norm, output, mlp_norm, up, down = (stem + name for name in rest)
        return EncoderLayerNames(norm, qkv, output, mlp_norm, up, down)

    @cached_property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the checkpoint: name → shape."""
        hidden, inner, patch = self.hidden_size, self.intermediate_size, self.patch_size
        frames = () if self.kind == SIGLIP else (self.temporal,)
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.patch_embedding}.weight": (hidden, self.channels, *frames, patch, patch),
            f"{self.patch_embedding}.bias": (hidden,),
            self.position_embedding: (self.positions**2, hidden),
        }
        merged = hidden * self.merge**2
        if self.projector:
            shapes[f"{self.projector}.weight"] = (self.out_size, merged)
        pairs: list[tuple[str, tuple[int, ...]]] = [(self.final_norm, (hidden,))] if self.final_norm else []
        for merger in self.mergers:
            pairs += [(merger.norm, (merged if merger.joins_first else hidden,)), (merger.up, (merged, merged))]
            pairs += [(merger.down, (self.out_size, merged))]
        for index in range(self.num_layers):
            names = self.layer(index)
            each = hidden * 3 // len(names.qkv)
            pairs += [(names.norm, (hidden,)), (names.mlp_norm, (hidden,))]
            pairs += [(part, (each, hidden)) for part in names.qkv] + [(names.output, (hidden, hidden))]
            pairs += [(names.up, (inner, hidden)), (names.down, (hidden, inner))]
        for name, shape in pairs:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
        return shapes


# --- readers: of one family's config.json each ------------------------------------------------------------


def read_siglip(
    config: Mapping[str, Any],
    where: str,
    out_size: int,
    settings: ImageSettings | None,
    image_token_id: int,
    video: str = "",
) -> VisionSpec:
    """Return the encoder of an Idefics3 or SmolVLM, by the defaults of their configuration classes.

    ``settings``: of the checkpoint's image processor; None: the usual ones for the encoder's size. ``image_token_id``:
    the default of the class. ``video``: see VisionSpec. Raises CheckpointError or UnsupportedModelError.
    """
    top = Fields(config, where)
    fields = Fields(top.table("vision_config") or {}, f"vision_config of {where}")
    image_size, patch = fields.whole("image_size", 224), fields.whole("patch_size", 32)
    merge = top.whole("scale_factor", 2)
    if settings is None:
        tokens = max(1, (image_size // patch // merge) ** 2)
        settings = TileSettings(4 * image_size, image_size, tokens, True, _LANCZOS, _HALVES)
    if isinstance(settings, PatchSettings):
        raise UnsupportedModelError("The image processor cuts patches, but this encoder takes tiles.")
    return _made(
        where,
        lambda: VisionSpec(
            kind=SIGLIP,
            hidden_size=fields.whole("hidden_size", 1152),
            intermediate_size=fields.whole("intermediate_size", 3072),
            num_layers=fields.whole("num_hidden_layers", 12),
            num_heads=fields.whole("num_attention_heads", 16),
            patch_size=patch,
            positions=image_size // patch,
            merge=merge,
            out_size=out_size,
            image_token_id=top.count("image_token_id", image_token_id),
            processor=settings,
            norm_eps=fields.number("layer_norm_eps", 1e-6, zero=True),
            activation=_activation(fields),
            channels=fields.whole("num_channels", 3),
            prefix="model.vision_model.",
            projector="model.connector.modality_projection.proj",
            video=video,
        ),
    )


def read_qwen3_vl(config: Mapping[str, Any], where: str, out_size: int, settings: ImageSettings | None) -> VisionSpec:
    """Return the encoder of a Qwen3-VL, by the defaults of its configuration classes. Raises what ``read_siglip``
    raises."""
    top = Fields(config, where)
    fields = Fields(top.table("vision_config") or {}, f"vision_config of {where}")
    text = Fields(top.table("text_config") or {}, f"text_config of {where}")
    patch, merge = fields.whole("patch_size", 16), fields.whole("spatial_merge_size", 2)
    temporal = fields.whole("temporal_patch_size", 2)
    if settings is None:
        unit = (patch * merge) ** 2
        settings = PatchSettings(patch, merge, temporal, 64 * unit, 16384 * unit, _BICUBIC, _HALVES)
    if isinstance(settings, TileSettings):
        raise UnsupportedModelError("The image processor cuts tiles, but this encoder takes patches.")
    rope = Fields(fields.table("rope_parameters") or {}, f"rope_parameters of vision_config of {where}")
    decoder_rope = Fields(text.table("rope_parameters") or text.table("rope_scaling") or {}, f"The RoPE of {where}")
    if fields.whole("out_hidden_size", 3584) != out_size:
        fields.refuse("out_hidden_size", f"{out_size}, the hidden_size of the decoder")
    side = math.isqrt(fields.whole("num_position_embeddings", 2304))
    return _made(
        where,
        lambda: VisionSpec(
            kind=QWEN3_VL,
            hidden_size=fields.whole("hidden_size", 1152),
            intermediate_size=fields.whole("intermediate_size", 4304),
            num_layers=fields.whole("depth", 27),
            num_heads=fields.whole("num_heads", 16),
            patch_size=patch,
            positions=side,
            merge=merge,
            out_size=out_size,
            image_token_id=top.count("image_token_id", 151655),
            processor=settings,
            activation=_activation(fields),
            channels=fields.whole("in_channels", 3),
            prefix="model.visual.",
            temporal=temporal,
            rope_theta=rope.number("rope_theta", 10000.0),
            deepstack=_counts(fields, "deepstack_visual_indexes", (8, 16, 24)),
            mrope=_counts(decoder_rope, "mrope_section", (24, 20, 20)),
            video=QWEN3_VL_VIDEO,
            video_token_id=top.count("video_token_id", 151656),
        ),
    )


def _counts(fields: Fields, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = fields.counts(name)
    return default if found is None else tuple(found)


def _activation(fields: Fields) -> str:
    activation = fields.text("hidden_act", "gelu_pytorch_tanh")
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"The encoder's activation {activation!r} is not supported; {', '.join(sorted(_ACTIVATIONS))} are."
        )
    return _ACTIVATIONS[activation]


def _made(where: str, make: Callable[[], VisionSpec]) -> VisionSpec:
    try:
        return make()
    except ValueError as error:
        raise CheckpointError(f"{where} describes no encoder: {error}.") from None
