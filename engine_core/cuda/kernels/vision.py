"""What only the encoder of a model that sees needs: patches and LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass

from engine_core.cuda.driver import DeviceArray, Launch
from engine_core.cuda.kernels import KernelArgumentError, Kernels, check, float_define
from engine_core.cuda.kernels.launch_configs import ELEMENTWISE_THREADS, RMS_NORM_THREADS


@dataclass(frozen=True)
class Tile:
    """A square picture that is cut into square patches; pixels behind the last whole patch are left out."""

    channels: int
    size: int  # pixels of a side
    patch: int  # pixels of a side

    @property
    def side(self) -> int:
        """The patches of a side."""
        return self.size // self.patch

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size


def patches(
    kernels: Kernels, pixels: DeviceArray, output: DeviceArray, values: int, tile: Tile | None = None
) -> Launch:
    """output [n, cols], 16-bit ← the ``values`` values of each of n patches, then zeros; the grid is n.

    ``pixels``: float32 [n, values], or of a ``tile`` [channels, size, size], whose patches are row by row and have
    their channels one after the other. Raises KernelArgumentError.
    """
    count, cols = output.shape
    check("output", output, (count, cols), kernels.dtype)
    check("pixels", pixels, (count, values) if tile is None else tile.shape, "fp32")
    if cols < values:
        raise KernelArgumentError(f"Rows of {cols} values have no room for the {values} of a patch.")
    defines: dict[str, int | str] = {"COLS": cols, "VALUES": values, "THREADS": ELEMENTWISE_THREADS}
    if tile is not None:
        if (values, count) != (tile.channels * tile.patch**2, tile.side**2):
            raise KernelArgumentError(f"{count} patches of {values} values are not those of {tile}.")
        defines |= {"TILE": tile.size, "PATCH": tile.patch, "SIDE": tile.side}
    function = kernels.function("patches", "patches", defines)
    return Launch(kernels.device, function, (count,), ELEMENTWISE_THREADS, [pixels, output])


def layer_norm(
    kernels: Kernels,
    rows: DeviceArray,
    params: DeviceArray,
    output: DeviceArray,
    norm_eps: float,
    merged: tuple[int, int] | None = None,
) -> Launch:
    """output [n, cols], 16-bit ← LayerNorm of rows [n, cols], float32; the grid is n.

    ``params``: float32 [3, cols], weight, bias and what is added to each row first. ``merged``: (m, side), rows are
    the patches of a tile of ``side`` to a row, and output [n / m², m² cols] has m x m neighbours in a row: those of the
    first row of patches, then those of the next one. Raises KernelArgumentError.
    """
    count, cols = rows.shape
    if cols % 8:
        raise KernelArgumentError(f"Rows of {cols} values; the kernel reads a multiple of 8.")
    check("rows", rows, (count, cols), "fp32")
    check("params", params, (3, cols), "fp32")
    defines: dict[str, int | str] = {"COLS": cols, "THREADS": RMS_NORM_THREADS, "NORM_EPS": float_define(norm_eps)}
    if merged is None:
        check("output", output, (count, cols), kernels.dtype)
    else:
        merge, side = merged
        if side % merge or count != side**2:
            raise KernelArgumentError(
                f"{count} rows are no {side} x {side} patches that {merge} x {merge} make one of."
            )
        check("output", output, (count // merge**2, merge**2 * cols), kernels.dtype)
        defines |= {"MERGE": merge, "SIDE": side}
    function = kernels.function("layer_norm", "layer_norm", defines)
    return Launch(kernels.device, function, (count,), RMS_NORM_THREADS, [rows, params, output])
