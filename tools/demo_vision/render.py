"""Pictures of scenes by ray casting, a batch at a time, in torch: the same code on the CPU and compiled for a GPU.

    python -m tools.demo_vision.render --seed 7 table.png              # one picture, 240 pixels high

Every pixel casts a ray against the spheres, boxes and frusta of its scene and another one towards the light for shadows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.demo_vision import scene as layout
from tools.demo_vision.scene import LID, OPEN, Scene, random_scene, row_of

FAR = 1e6
_NEAR = 1e-3
_Ray = tuple[Tensor, Tensor, Tensor]


def _dot(a: _Ray, b: _Ray) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _columns(primitives: Tensor) -> list[Tensor]:
    """Return primitives [batch, count, numbers] as a list of [batch, count, 1]."""
    return [column.unsqueeze(-1) for column in primitives.unbind(-1)]


def _sphere_distances(o: _Ray, d: _Ray, spheres: list[Tensor]) -> Tensor:
    x, y, z, r = spheres[:4]
    local = o[0] - x, o[1] - y, o[2] - z
    b = _dot(local, d)
    disc = b * b - _dot(local, local) + r * r
    t = -b - disc.clamp_min(0).sqrt()
    return torch.where((disc > 0) & (t > _NEAR), t, FAR)


def _box_distances(o: _Ray, d: _Ray, boxes: list[Tensor]) -> Tensor:
    x, y, z, hx, hy, hz, c, s = boxes[:8]
    ox, oz = o[0] - x, o[2] - z
    origin = c * ox + s * oz, o[1] - y, c * oz - s * ox
    direction = c * d[0] + s * d[2], d[1], c * d[2] - s * d[0]
    lows, highs = [], []
    for p, v, half in zip(origin, direction, (hx, hy, hz)):
        inverse = 1 / torch.where(v.abs() < 1e-7, 1e-7, v)
        first, second = (-half - p) * inverse, (half - p) * inverse
        lows.append(torch.minimum(first, second))
        highs.append(torch.maximum(first, second))
    enter = torch.maximum(torch.maximum(lows[0], lows[1]), lows[2])
    leave = torch.minimum(torch.minimum(highs[0], highs[1]), highs[2])
    return torch.where((enter < leave) & (enter > _NEAR), enter, FAR)


def _side_roots(origin: _Ray, d: _Ray, radius: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two distances at which the ray crosses the cone radius + slope · y, FAR if it does not.

    ``origin`` is from the cone's base.
    """
    a = d[0] * d[0] + d[2] * d[2] - (slope * d[1]) ** 2
    a = torch.where(a.abs() < 1e-7, 1e-7, a)
    wide = radius + slope * origin[1]
    b = origin[0] * d[0] + origin[2] * d[2] - slope * d[1] * wide
    disc = b * b - a * (origin[0] ** 2 + origin[2] ** 2 - wide * wide)
    root = disc.clamp_min(0).sqrt()
    return torch.where(disc > 0, (-b - root) / a, FAR), torch.where(disc > 0, (-b + root) / a, FAR)


def _frustum_distances(o: _Ray, d: _Ray, frusta: list[Tensor]) -> Tensor:
    x, z, y, h, r0, r1 = frusta[:6]
    origin = o[0] - x, o[1] - y, o[2] - z
    best = None
    for t in _side_roots(origin, d, r0, (r1 - r0) / h):
        height = origin[1] + t * d[1]
        t = torch.where((height >= 0) & (height <= h) & (t > _NEAR), t, FAR)
        best = t if best is None else torch.minimum(best, t)
    cap = (h - origin[1]) / torch.where(d[1].abs() < 1e-7, 1e-7, d[1])
    px, pz = origin[0] + cap * d[0], origin[2] + cap * d[2]
    return torch.minimum(best, torch.where((px * px + pz * pz <= r1 * r1) & (cap > _NEAR), cap, FAR))


def _picked(primitives: Tensor, index: Tensor) -> list[Tensor]:
    """Return the numbers of primitive ``index`` [batch, pixels] for every pixel: a list of [batch, pixels]."""
    return [column.gather(1, index) for column in primitives.unbind(-1)]


def _table_colour(x: Tensor, z: Tensor, s: list[Tensor]) -> tuple[Tensor, ...]:
    pattern, angle, frequency, phase = s[17:21]
    u, v = x * angle.cos() + z * angle.sin(), z * angle.cos() - x * angle.sin()
    stripes = (u * frequency + phase).sin() * 0.5 + 0.5
    checks = (((u * frequency * 0.5 + phase).floor() + (v * frequency * 0.5).floor()) % 2).abs()
    grain = ((u * frequency * 2 + 1.5 * (v * 0.9 + phase).sin() + phase).sin() + (u * frequency * 5.3 + v * 0.7).sin()) * 0.25 + 0.5
    mix = torch.where(pattern < 0.5, stripes, torch.where(pattern < 1.5, checks, grain))
    return tuple(first + (second - first) * mix for first, second in zip(s[11:14], s[14:17]))


def _rays(camera: list[Tensor], width: int, height: int) -> tuple[_Ray, _Ray]:
    """Return the origin, each [batch, 1], and the directions of length 1, each [batch, pixels], of the pixels' rays."""
    pixels = torch.arange(width * height, device=camera[0].device)
    sx = ((2 * (pixels % width) + 1) / width - 1) * camera[12]
    sy = (1 - (2 * (pixels // width) + 1) / height) * camera[13]
    d = tuple(camera[9 + i] + sx * camera[3 + i] + sy * camera[6 + i] for i in range(3))
    length = _dot(d, d).rsqrt()
    return (camera[0], camera[1], camera[2]), (d[0] * length, d[1] * length, d[2] * length)


def _table_distances(o: _Ray, d: _Ray, s: list[Tensor]) -> Tensor:
    t = torch.where(d[1] < -1e-4, -o[1] / torch.where(d[1] < -1e-4, d[1], -1e-4), FAR)
    x, z = o[0] + t * d[0], o[2] + t * d[2]
    return torch.where((x.abs() < s[8]) & (z > s[9]) & (z < s[10]), t, FAR)


class _Vessel(NamedTuple):
    """The place where rays meet frusta, [batch, pixels] each. Through an open top they go on to the inside."""

    t: Tensor  # distance: on the inner wall or the inner bottom for rays that go on
    inside: Tensor  # bool
    lid: Tensor  # bool
    normal: _Ray


def _vessel(o: _Ray, d: _Ray, t: Tensor, cone: list[Tensor], is_frustum: Tensor) -> _Vessel:
    """``t``: the distance to what is first. ``cone``: the numbers of each pixel's frustum."""
    cx, cz, cy, ch, r0, r1, wall, top = cone[:8]
    slope = (r1 - r0) / ch
    from_base = o[0] - cx, o[1] - cy, o[2] - cz
    hit = tuple(p + t * v for p, v in zip(from_base, d))
    on_top = is_frustum & (hit[1] > ch - 1e-3)
    across = (hit[0] ** 2 + hit[2] ** 2).sqrt()
    inside = on_top & (top == OPEN) & (across < r1 - wall)
    lid = (top == LID) & is_frustum & on_top
    t_wall = torch.maximum(*_side_roots(from_base, d, r0 - wall, slope))
    wall_height = from_base[1] + t_wall * d[1]
    t_floor = (wall - from_base[1]) / torch.where(d[1].abs() < 1e-7, 1e-7, d[1])
    on_floor = (wall_height < wall) | (t_wall >= FAR)
    t = torch.where(inside, torch.where(on_floor, t_floor, t_wall), t)
    hit = tuple(p + t * v for p, v in zip(from_base, d))
    radial = (hit[0] ** 2 + hit[2] ** 2).clamp_min(1e-8).rsqrt()
    lean = (1 + slope * slope).rsqrt()
    outward = hit[0] * radial * lean, -slope * lean, hit[2] * radial * lean
    flip = torch.where(inside, -1.0, 1.0)
    flat = (on_top & ~inside) | (inside & on_floor)
    normal = tuple(torch.where(flat, up, flip * n) for up, n in zip((1e-9, 1.0, 1e-9), outward))
    return _Vessel(t, inside, lid, normal)


def _box_normal(point: _Ray, block: list[Tensor]) -> _Ray:
    """Return the normal of the face of a box that is nearest to ``point``."""
    bx, by, bz = point[0] - block[0], point[1] - block[1], point[2] - block[2]
    local = (block[6] * bx + block[7] * bz) / block[3], by / block[4], (block[6] * bz - block[7] * bx) / block[5]
    ax, ay, az = (v.abs() for v in local)
    face_x, face_y = (ax >= ay) & (ax >= az), (ay > ax) & (ay >= az)
    nx = torch.where(face_x, local[0].sign(), 0.0)
    ny = torch.where(face_y, local[1].sign(), 0.0)
    nz = torch.where(face_x | face_y, 0.0, local[2].sign())
    return block[6] * nx - block[7] * nz, ny, block[7] * nx + block[6] * nz


def _nearest(o: _Ray, d: _Ray, listed: tuple[list[Tensor], ...]) -> list[tuple[Tensor, Tensor]]:
    """Return the distance to the nearest of the spheres, boxes and frusta in ``listed``, and its index, [batch, pixels]."""
    origin, direction = tuple(v.unsqueeze(1) for v in o), tuple(v.unsqueeze(1) for v in d)
    casts = _sphere_distances, _box_distances, _frustum_distances
    return [distances(origin, direction, some).min(1) for distances, some in zip(casts, listed)]


def _primitives(rows: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Return camera and surroundings, columns of [batch, 1]; spheres, boxes, frusta; objects; [batch, count, numbers]."""
    kinds = ((layout.MAX_SPHERES, layout.SPHERE), (layout.MAX_BOXES, layout.BOX), (layout.MAX_FRUSTA, layout.FRUSTUM),
             (layout.MAX_OBJECTS, layout.OBJECT))  # fmt: skip
    sizes = [layout.CAMERA, layout.SURROUNDINGS, *(count * numbers for count, numbers in kinds)]
    camera, surroundings, *others = rows.split(sizes, 1)
    *solids, objects = (some.unflatten(1, kind) for some, kind in zip(others, kinds))
    return list(camera.unsqueeze(-1).unbind(1)), list(surroundings.unsqueeze(-1).unbind(1)), solids, objects


def render_rows(rows: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return pictures float32 [batch, 3, height, width] in 0 to 1, and the index of the object at each pixel (-1: none).

    ``rows`` are float32 [batch, ROW], as scene.row_of makes them.
    """
    camera, s, solids, objects = _primitives(rows)
    o, d = _rays(camera, width, height)
    listed = tuple(map(_columns, solids))
    (t_sphere, i_sphere), (t_box, i_box), (t_frustum, i_frustum) = _nearest(o, d, listed)
    t_table = _table_distances(o, d, s)
    t = torch.minimum(torch.minimum(t_sphere, t_box), torch.minimum(t_frustum, t_table))
    is_sphere, is_box, is_frustum = ((some <= t) & (some < FAR) for some in (t_sphere, t_box, t_frustum))
    is_object = is_sphere | is_box | is_frustum
    is_table = (t_table <= t) & (t_table < FAR) & ~is_object

    ball, block, cone = (_picked(some, index) for some, index in zip(solids, (i_sphere, i_box, i_frustum)))
    vessel = _vessel(o, d, t, cone, is_frustum)
    point = tuple(p + vessel.t * v for p, v in zip(o, d))
    n_ball = tuple((p - q) / ball[3] for p, q in zip(point, ball[:3]))
    normal = tuple(
        torch.where(is_sphere, a, torch.where(is_box, b, torch.where(is_frustum, f, up)))
        for a, b, f, up in zip(n_ball, _box_normal(point, block), vessel.normal, (0.0, 1.0, 0.0))
    )
    owner = torch.where(is_sphere, ball[4], torch.where(is_box, block[8], torch.where(is_frustum, cone[8], -1.0))).long()

    light = tuple(s[i] + torch.zeros_like(t) for i in range(3))
    shadows = _nearest(tuple(p + 2e-2 * n for p, n in zip(point, normal)), light, listed)
    in_shadow = torch.stack([distance for distance, _ in shadows]).amin(0) < 100.0
    lit = torch.where(in_shadow & ~vessel.inside, 0.0, 1.0)

    thing = _picked(objects, owner.clamp_min(0))
    table = _table_colour(point[0], point[2], s)
    facing = _dot(normal, light).clamp_min(0)
    mirror = tuple(2 * _dot(normal, light) * n - v for n, v in zip(normal, light))
    shine = (-_dot(mirror, d)).clamp_min(0) ** 24 * 0.35 * lit * is_object
    shade = s[3] * (0.75 + 0.25 * normal[1]) + s[4] * facing * lit
    shade = torch.where(vessel.inside, shade * (1 - 0.87 * cone[3]).clamp_min(0.6), shade)  # deep vessels are darker inside
    colours = []
    for i in range(3):
        surface = torch.where(is_object, torch.where(vessel.lid, 0.62, thing[i]), table[i])
        seen = (surface * shade + shine) * s[5 + i]
        colours.append(torch.where(is_object | is_table, seen, s[21 + i]))
    picture = torch.stack(colours, 1).clamp(0, 1).unflatten(-1, (height, width))
    return picture, owner.unflatten(-1, (height, width))


def picture_of(scene: Scene, height: int = 240, finer: int = 2) -> Image.Image:
    """Return one scene as a Pillow image with square pixels, rendered ``finer`` times as large and averaged."""
    width = round(height * scene.camera.tan_x / scene.camera.tan_y)
    with torch.no_grad():
        picture, _ = render_rows(torch.from_numpy(row_of(scene))[None], width * finer, height * finer)
        picture = torch.nn.functional.avg_pool2d(picture, finer)[0]
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy().astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, default=240)
    args = parser.parse_args()
    scene = random_scene(Random(args.seed))
    picture_of(scene, args.height).save(args.file)
    for thing in scene.things:
        print(f"{thing.kind[0]} {thing.kind[1]} at {thing.percent}")


if __name__ == "__main__":
    main()
