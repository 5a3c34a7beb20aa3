"""Random tabletop scenes as data: objects on a table, a camera, a light, and how all of it is handed to the renderer.

World units are decimetres; x points right, y up, z away from the camera, and the table's top is y = 0. Positions in the
picture are fractions of its width and height, from the left and from the top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np

from tools.demo_vision.words import COLOURS, KINDS, NEW_KINDS, NEW_PAIRS, SHAPES, Kind

MAX_OBJECTS = 6
MAX_SPHERES, MAX_BOXES, MAX_FRUSTA = 6, 12, 12
LEAST_GAP = 0.035  # between the centres of two objects along the picture's width, so that "from left to right" is clear
MOST_OVERLAP = 0.3  # of the smaller of two boxes around objects in the picture
HELD_OUT = ("scenes", "pairs", "objects")  # new scenes, new pairs of kinds, new combinations of colour and shape

Vector = tuple[float, ...]  # x, y and z, or red, green and blue


@dataclass(frozen=True, slots=True)
class Camera:
    """A pinhole camera: where it is, its axes (unit vectors) and its field of view."""

    position: Vector
    right: Vector
    up: Vector
    forward: Vector
    tan_x: float  # of half the horizontal field of view
    tan_y: float

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """The place of a point of the world in the picture."""
        p, r, u, f = self.position, self.right, self.up, self.forward
        x, y, z = x - p[0], y - p[1], z - p[2]
        depth = x * f[0] + y * f[1] + z * f[2]
        across = x * r[0] + y * r[1] + z * r[2]
        above = x * u[0] + y * u[1] + z * u[2]
        return 0.5 + across / (2 * depth * self.tan_x), 0.5 - above / (2 * depth * self.tan_y)

    def ground(self, px: float, py: float) -> tuple[float, float] | None:
        """x and z of the point of the table's plane that is seen at (px, py); none above the horizon."""
        sx, sy = (2 * px - 1) * self.tan_x, (1 - 2 * py) * self.tan_y
        p, r, u, f = self.position, self.right, self.up, self.forward
        down = f[1] + sx * r[1] + sy * u[1]
        if down > -0.05:
            return None
        t = -p[1] / down
        return p[0] + t * (f[0] + sx * r[0] + sy * u[0]), p[2] + t * (f[2] + sx * r[2] + sy * u[2])


@dataclass(frozen=True, slots=True)
class Thing:
    """One object on the table."""

    kind: Kind
    x: float
    z: float
    radius: float  # of the circle on the table that holds it
    height: float
    size: float  # what the primitives are scaled by
    yaw: float
    rgb: Vector
    at: tuple[float, float]  # its centre in the picture
    base: float  # the place of the centre of its base along the picture's height
    box: tuple[float, float, float, float]  # left, top, right, bottom in the picture

    @property
    def percent(self) -> list[int]:
        """Its centre in whole percent of the picture's width and height, 0 to 99."""
        return [min(99, max(0, round(100 * v))) for v in self.at]


@dataclass(frozen=True, slots=True)
class Scene:
    """All of a picture: the camera, the objects, light, table and background."""

    camera: Camera
    things: tuple[Thing, ...]  # from left to right in the picture
    surroundings: tuple[float, ...]  # light, table and background: see render.py


# Shape → radius and height for size 1.
_EXTENT = {"cube": (0.50, 0.72), "ball": (0.42, 0.84), "cup": (0.40, 0.80), "bottle": (0.32, 1.75), "bowl": (0.72, 0.46),
           "can": (0.34, 0.95), "plate": (0.90, 0.12)}  # fmt: skip


def _normalized(x: float, y: float, z: float) -> Vector:
    length = math.sqrt(x * x + y * y + z * z)
    return x / length, y / length, z / length


def _cross(a: Vector, b: Vector) -> Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _camera(rng: Random) -> Camera:
    pitch = math.radians(rng.uniform(28, 62))
    tan_x = math.tan(math.radians(rng.uniform(38, 62)) / 2)
    tan_y = tan_x / rng.choice((1.0, 4 / 3, 4 / 3, 16 / 9))
    distance = rng.uniform(4.6, 6.0) / (2 * tan_x)
    yaw, roll = math.radians(rng.uniform(-12, 12)), math.radians(rng.uniform(-4, 4))
    forward = math.cos(pitch) * math.sin(yaw), -math.sin(pitch), math.cos(pitch) * math.cos(yaw)
    look = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)
    position = look[0] - distance * forward[0], -distance * forward[1], look[1] - distance * forward[2]
    right = _normalized(*_cross((0.0, 1.0, 0.0), forward))
    up = _cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    turned_right = tuple(c * r + s * u for r, u in zip(right, up))
    turned_up = tuple(c * u - s * r for r, u in zip(right, up))
    return Camera(position, turned_right, turned_up, forward, tan_x, tan_y)


def _surroundings(rng: Random) -> tuple[float, ...]:
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(35, 80))
    light = math.cos(elevation) * math.sin(azimuth), math.sin(elevation), math.cos(elevation) * math.cos(azimuth)
    ambient, strength = rng.uniform(0.35, 0.6), rng.uniform(0.5, 0.75)
    tint = [rng.uniform(0.93, 1.07) for _ in range(3)]
    half_width, near, far = rng.uniform(3.0, 6.0), rng.uniform(-6.0, -3.5), rng.uniform(2.5, 6.0)
    grey = rng.uniform(0.25, 0.8)
    warm = rng.choice((0.0, rng.uniform(0.0, 0.14), rng.uniform(0.1, 0.22)))
    first = (grey + warm * 0.6, grey + warm * 0.1, grey - warm * 0.8)
    contrast = rng.choice((0.0, rng.uniform(-0.12, 0.12), rng.uniform(-0.06, 0.06)))
    second = [v + contrast for v in first]
    pattern = rng.choice((0.0, 1.0, 2.0))  # stripes, checks, grain
    angle, frequency, phase = rng.uniform(0, math.pi), rng.uniform(1.0, 7.0), rng.uniform(0, 6.28)
    behind = [rng.uniform(0.1, 0.8)] * 3
    behind = [min(1.0, max(0.0, v + rng.uniform(-0.1, 0.1))) for v in behind]
    return (*light, ambient, strength, *tint, half_width, near, far, *first, *second, pattern, angle, frequency, phase, *behind)


def _rgb(rng: Random, colour: str) -> Vector:
    gain, shift = rng.uniform(0.88, 1.08), 0.035
    return tuple(min(1.0, max(0.02, v * gain + rng.uniform(-shift, shift))) for v in COLOURS[colour])


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _placed(rng: Random, kind: Kind, camera: Camera, things: list[Thing]) -> Thing | None:
    """``kind`` somewhere on the table where it is wholly in the picture and no other object is in the way."""
    size = rng.uniform(0.85, 1.15)
    radius, height = (size * v for v in _EXTENT[kind[1]])
    right, forward = camera.right, camera.forward
    level = math.hypot(forward[0], forward[2])
    fx, fz = forward[0] / level, forward[2] / level
    for _ in range(12):
        spot = camera.ground(rng.uniform(0.06, 0.94), rng.uniform(0.12, 0.94))
        if spot is None:
            continue
        x, z = spot
        at = camera.project(x, height / 2, z)
        if any(abs(at[0] - other.at[0]) < LEAST_GAP for other in things):
            continue
        if any((x - o.x) ** 2 + (z - o.z) ** 2 < (radius + o.radius + 0.08) ** 2 for o in things):
            continue
        rx, rz = radius * right[0], radius * right[2]
        edge = [camera.project(x + side * rx, y, z + side * rz) for side in (-1, 1) for y in (0.0, height)]
        edge += [camera.project(x - radius * fx, 0.0, z - radius * fz), camera.project(x + radius * fx, height, z + radius * fz)]
        across, along = [p[0] for p in edge], [p[1] for p in edge]
        box = min(across), min(along), max(across), max(along)
        if box[0] < 0.01 or box[1] < 0.01 or box[2] > 0.99 or box[3] > 0.99:
            continue
        if any(_overlap(box, other.box) > MOST_OVERLAP for other in things):
            continue
        base = camera.project(x, 0.0, z)[1]
        return Thing(kind, x, z, radius, height, size, rng.uniform(0, 2 * math.pi), _rgb(rng, kind[0]), at, base, box)
    return None


def _parts(kinds: list[Kind]) -> tuple[int, int]:
    """Boxes and frusta that the kinds take."""
    shapes = [shape for _, shape in kinds]
    boxes = shapes.count("cube") + 3 * shapes.count("cup")
    frusta = sum(shapes.count(s) for s in ("cup", "bowl", "can", "plate")) + 3 * shapes.count("bottle")
    return boxes, frusta


def _allowed(kind: Kind, kinds: list[Kind], held_out: str) -> bool:
    if held_out != "objects" and kind in NEW_KINDS:
        return False
    return bool(held_out) or all(frozenset((kind, other)) not in NEW_PAIRS for other in kinds if other != kind)


def _shows(kinds: list[Kind], held_out: str) -> bool:
    """Return whether the kinds hold what ``held_out`` promises."""
    if held_out == "objects":
        return any(kind in NEW_KINDS for kind in kinds)
    if held_out == "pairs":
        return any(frozenset((a, b)) in NEW_PAIRS for i, a in enumerate(kinds) for b in kinds[:i])
    return True


def _kinds(rng: Random, held_out: str) -> list[Kind]:
    """The kinds of a scene's objects. Half the scenes have few shapes and colours, so that things repeat and must be counted."""
    while True:
        count = rng.choices(range(MAX_OBJECTS + 1), (0.02, 0.07, 0.13, 0.18, 0.2, 0.2, 0.2))[0]
        shapes, colours = list(SHAPES), list(COLOURS)
        if rng.random() < 0.5:
            shapes, colours = rng.sample(SHAPES, rng.randint(1, 3)), rng.sample(colours, rng.randint(2, 4))
        kinds: list[Kind] = []
        for _ in range(4 * count):
            kind = rng.choice(colours), rng.choice(shapes)
            if held_out in ("pairs", "objects") and rng.random() < 0.25:
                kind = rng.choice(sorted(NEW_KINDS)) if held_out == "objects" else rng.choice(KINDS)
            boxes, frusta = _parts([*kinds, kind])
            if _allowed(kind, kinds, held_out) and boxes <= MAX_BOXES and frusta <= MAX_FRUSTA:
                kinds.append(kind)
                if len(kinds) == count:
                    break
        if _shows(kinds, held_out):
            return kinds


def random_scene(rng: Random, held_out: str = "") -> Scene:
    """A scene for training, or one that holds what training never sees (an entry of HELD_OUT)."""
    while True:
        camera = _camera(rng)
        things: list[Thing] = []
        for kind in sorted(_kinds(rng, held_out), key=lambda kind: -_EXTENT[kind[1]][0]):
            thing = _placed(rng, kind, camera, things)
            if thing is not None:
                things.append(thing)
        if _shows([thing.kind for thing in things], held_out):
            return Scene(camera, tuple(sorted(things, key=lambda thing: thing.at[0])), _surroundings(rng))


# ---- the scene as one row of numbers, which the renderer reads

CAMERA, SURROUNDINGS, SPHERE, BOX, FRUSTUM, OBJECT = 14, 24, 5, 9, 9, 5
ROW = CAMERA + SURROUNDINGS + MAX_SPHERES * SPHERE + MAX_BOXES * BOX + MAX_FRUSTA * FRUSTUM + MAX_OBJECTS * OBJECT
_NOWHERE = -1000.0
SOLID, OPEN, LID = 0.0, 1.0, 2.0  # what is on top of a frustum


def _primitives(index: int, thing: Thing) -> tuple[list, list, list]:
    """Spheres (x y z r), boxes (x y z, half x y z, cos, sin), frusta (x z, bottom, height, radii, wall, top) of one object."""
    x, z, s, shape = thing.x, thing.z, thing.size, thing.kind[1]
    c, n = math.cos(thing.yaw), math.sin(thing.yaw)
    if shape == "ball":
        return [(x, 0.42 * s, z, 0.42 * s, index)], [], []
    if shape == "cube":
        return [], [(x, 0.36 * s, z, 0.36 * s, 0.36 * s, 0.36 * s, c, n, index)], []
    if shape == "can":
        return [], [], [(x, z, 0.0, 0.95 * s, 0.34 * s, 0.34 * s, 0.04 * s, LID, index)]
    if shape == "bowl":
        return [], [], [(x, z, 0.0, 0.46 * s, 0.32 * s, 0.72 * s, 0.07 * s, OPEN, index)]
    if shape == "plate":
        return [], [], [(x, z, 0.0, 0.12 * s, 0.55 * s, 0.90 * s, 0.08 * s, OPEN, index)]
    if shape == "bottle":
        return [], [], [
            (x, z, 0.0, 1.0 * s, 0.32 * s, 0.32 * s, 0.0, SOLID, index),
            (x, z, 1.0 * s, 0.3 * s, 0.32 * s, 0.12 * s, 0.0, SOLID, index),
            (x, z, 1.3 * s, 0.45 * s, 0.12 * s, 0.12 * s, 0.0, LID, index),
        ]  # fmt: skip
    bars = [(0.52, 0.62, 0.18, 0.06), (0.52, 0.2, 0.18, 0.06), (0.67, 0.41, 0.06, 0.27)]  # the handle: distance, y, half x, half y
    boxes = [(x + c * d * s, y * s, z + n * d * s, hx * s, hy * s, 0.07 * s, c, n, index) for d, y, hx, hy in bars]
    return [], boxes, [(x, z, 0.0, 0.80 * s, 0.34 * s, 0.40 * s, 0.05 * s, OPEN, index)]


def row_of(scene: Scene) -> np.ndarray:
    """The scene as float32 [ROW]: camera, surroundings, primitives, and of each object its colour and its centre."""
    camera = scene.camera
    numbers = [*camera.position, *camera.right, *camera.up, *camera.forward, camera.tan_x, camera.tan_y, *scene.surroundings]
    spheres: list[tuple] = []
    boxes: list[tuple] = []
    frusta: list[tuple] = []
    for index, thing in enumerate(scene.things):
        for all_of_kind, some in zip((spheres, boxes, frusta), _primitives(index, thing)):
            all_of_kind += some
    for some, count, nothing in (
        (spheres, MAX_SPHERES, (0.0, _NOWHERE, 0.0, 0.01, -1)),
        (boxes, MAX_BOXES, (0.0, _NOWHERE, 0.0, 0.01, 0.01, 0.01, 1.0, 0.0, -1)),
        (frusta, MAX_FRUSTA, (0.0, 0.0, _NOWHERE, 0.01, 0.01, 0.01, 0.0, SOLID, -1)),
    ):
        for primitive in [*some, *[nothing] * (count - len(some))]:
            numbers += primitive
    for thing in scene.things:
        numbers += [*thing.rgb, *thing.at]
    numbers += [0.0] * (OBJECT * (MAX_OBJECTS - len(scene.things)))
    return np.array(numbers, dtype=np.float32)
