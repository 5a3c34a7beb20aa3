"""The arrays of a vision encoder in device memory: names, shapes and dtypes.

``layout`` adds them to those of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from engine_core.backends.cuda.padding import head_axis_of, padded_size
from engine_core.cuda.driver import ITEM_BYTES, aligned
from engine_core.cuda.kernels import CHUNK_WORDS
from engine_core.cuda.kernels.attention import AttentionShape
from engine_core.cuda.kernels.vision import Tile
from engine_core.models.padding import Axis
from engine_core.models.vision import VisionSpec
from engine_core.vision.part_encoder import BLOCK_TOKENS, cache_blocks

Arrays = dict[str, tuple[tuple[int, ...], str]]  # name → (shape, dtype)
PREFIX = "vision."  # of the names of an encoder's arrays
DTYPE = "fp16"  # of matrices and activations, whatever the model's


@dataclass(frozen=True)
class EncoderLayout:
    """The sizes that the kernels compute an encoder with, and its arrays."""

    spec: VisionSpec
    max_images: int  # whose features are kept
    out: int  # the hidden size of the model as its kernels have it

    # --- sizes ----------------------------------------------------------------------------------------

    @property
    def hidden(self) -> int:
        return self.spec.hidden_size

    @property
    def inner(self) -> int:
        return padded_size(self.spec.intermediate_size)

    @property
    def patch_values(self) -> int:
        """The values of a patch in a row of the first GEMM."""
        return padded_size(self.spec.patch_values)

    @property
    def merged(self) -> int:
        """The values of patches that become one token."""
        return self.hidden * self.spec.merge**2

    @property
    def rows(self) -> int:
        """The patches of the largest part."""
        return self.spec.most_patches

    @property
    def tokens(self) -> int:
        """The tokens of the largest part."""
        return self.spec.part_tokens(self.spec.most_tokens)

    @property
    def tile(self) -> Tile:
        return Tile(self.spec.channels, self.spec.tile_size, self.spec.patch_size)

    @cached_property
    def head(self) -> Axis:
        """The elements of a head as the kernels have them."""
        return head_axis_of(self.spec.head_dim, 0)

    @cached_property
    def attention(self) -> AttentionShape:
        """The attention of a part; its K and V are in a cache of its own for the time of a layer."""
        heads = self.spec.num_heads
        return AttentionShape(heads, heads, self.head.size, self.rows, head_size=self.spec.head_dim, rotated=0)

    # --- arrays ---------------------------------------------------------------------------------------

    def weights(self) -> Arrays:
        """Return the arrays of the weights file.

        A norm's rows are weight, bias, and the biases of all that was added to the residual stream before it, which the
        GEMMs leave out.
        """
        norm, width = ((3, self.hidden), "fp32"), self.attention.num_heads * self.attention.head_dim
        arrays: Arrays = {
            "patches": ((self.hidden, self.patch_values), DTYPE),
            "positions": ((self.rows, self.hidden), "fp32"),  # with the bias of the patches
        }
        for index in range(self.spec.num_layers):
            layer: Arrays = {
                "norm": norm,
                "qkv": ((self.attention.qkv_width, self.hidden), DTYPE),
                "qkv_bias": ((self.attention.qkv_width,), DTYPE),
                "o": ((self.hidden, width), DTYPE),
                "mlp_norm": norm,
                "up": ((self.inner, self.hidden), DTYPE),
                "up_bias": ((self.inner,), DTYPE),
                "down": ((self.hidden, self.inner), DTYPE),
            }
            arrays |= {f"layers.{index}.{name}": array for name, array in layer.items()}
        arrays |= {"final_norm": norm, "projector": ((self.out, self.merged), DTYPE)}
        return {PREFIX + name: array for name, array in arrays.items()}

    def work(self) -> Arrays:
        """Return the arrays that hold something between two pieces of the work: the part that is being encoded, and
        the features that are kept."""
        return {
            "features": ((cache_blocks(self.spec, self.max_images) * BLOCK_TOKENS, self.out), "fp32"),
            "vision_hidden": ((self.rows, self.hidden), "fp32"),
            "vision_chunk": ((CHUNK_WORDS,), "int32"),  # 0 and the patches of the part
        }

    def scratch(self) -> dict[str, Arrays]:
        """Return the arrays of each phase of a piece, by its name; every phase begins at the start of the scratch."""
        shape = self.attention
        heads, width = shape.num_heads, shape.num_heads * shape.head_dim
        normed = ((self.rows, self.hidden), DTYPE)
        return {
            "patches": {
                "pixels": (self.tile.shape, "fp32"),
                "rows": ((self.rows, self.patch_values), DTYPE),
            },
            "attention": {
                "normed": normed,
                "qkv": ((self.rows, shape.qkv_width), DTYPE),
                "cache": ((2, heads, self.rows, shape.head_dim), DTYPE),
                "attended": ((self.rows, width), DTYPE),
            },
            "mlp": {"normed": normed, "inner": ((self.rows, self.inner), DTYPE)},
            "projector": {
                "merged": ((self.tokens, self.merged), DTYPE),
                "features": ((self.tokens, self.out), "fp32"),
            },
        }

    @property
    def scratch_bytes(self) -> int:
        return max(sum(map(array_bytes, phase.values())) for phase in self.scratch().values())

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a part's pixels on their way to the GPU."""
        return 4 * math.prod(self.tile.shape)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's memory: a picture that is prepared, and the pixels of two parts in pinned memory."""
        return self.spec.pixel_bytes + 2 * self.pixel_bytes

    @property
    def multiplications(self) -> int:
        """The multiplications of a layer."""
        width = self.attention.num_heads * self.attention.head_dim
        matrices = self.hidden * (4 * width + 2 * self.inner)
        return self.rows * (matrices + 2 * self.rows * width)


def array_bytes(array: tuple[tuple[int, ...], str]) -> int:
    """Return the bytes that an arena takes for an array."""
    shape, dtype = array
    return aligned(math.prod(shape) * ITEM_BYTES[dtype])
