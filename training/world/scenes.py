"""The miniature world: short captioned clips of one moving shape, rendered with exact ground truth.

Everything that a caption says is visible in every single frame. A moving shape carries a white lamp on its leading side and a
fading tail on the other, and the tail's length tells the speed: AnimateDiff's motion modules see no text, so they can only
continue what a frame already shows.
"""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

SIDE = 64  # pixels, height and width
FRAMES = 8
FPS = 8
STYLES = ("plain", "neon")

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.90, 0.14, 0.14),
    "yellow": (0.92, 0.84, 0.10),
    "green": (0.14, 0.76, 0.18),
    "cyan": (0.10, 0.78, 0.84),
    "blue": (0.18, 0.28, 0.94),
    "purple": (0.80, 0.18, 0.84),
}
RADII = {"small": 8.0, "large": 12.0}  # pixels: radius of the circle; the other shapes have about its area
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # (x, y), y points down
SPEEDS = {"slowly": 1.5, "fast": 3.0}  # pixels a frame
TAIL_FRAMES = 5.0  # the tail is as long as the way of so many frames
BACKGROUNDS = ("plain", "graded", "striped", "checked")

_SPEED_SPREAD = 0.08  # a clip's speed is drawn within this fraction of its word's
_HELD_OUT_PERCENT = 15


@dataclass(frozen=True)
class Content:
    """What a caption says. `direction` and `speed` are both None for a shape that stands still."""

    size: str
    colour: str
    shape: str
    direction: str | None
    speed: str | None
    background: str

    @property
    def velocity(self) -> tuple[float, float]:
        """Nominal (x, y) velocity in pixels a frame; y points down."""
        if self.direction is None:
            return 0.0, 0.0
        x, y = DIRECTIONS[self.direction]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]

    @property
    def caption(self) -> str:
        motion = "standing still" if self.direction is None else f"moving {self.direction} {self.speed}"
        return f"a {self.size} {self.colour} {self.shape} {motion} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """True for the combinations that no training clip shows (about 15%, chosen by a hash of the caption)."""
        return hashlib.sha256(self.caption.encode()).digest()[0] * 100 < _HELD_OUT_PERCENT * 256


@dataclass(frozen=True)
class Clip:
    """A rendered clip: frames (F, H, W, 3) uint8, the shape's centres (F, 2) in pixels (x, y), and its velocity (2,)."""

    frames: np.ndarray
    content: Content
    centres: np.ndarray
    velocity: np.ndarray


def all_contents() -> list[Content]:
    """Every combination that the caption grammar can say, in a fixed order."""
    motions = [(None, None), *itertools.product(DIRECTIONS, SPEEDS)]
    return [
        Content(size, colour, shape, direction, speed, background)
        for size, colour, shape, (direction, speed), background in itertools.product(
            RADII, COLOURS, SHAPES, motions, BACKGROUNDS
        )
    ]


def parse_caption(caption: str) -> Content:
    """Content of a caption of the grammar; ValueError for any other text."""
    content = _CONTENT_OF.get(caption.strip())
    if content is None:
        raise ValueError(
            f"Expected a caption such as {all_contents()[0].caption!r}, found {caption!r}; "
            "write it in the grammar of the miniature world."
        )
    return content


def draw_contents(count: int, *, held_out: bool, seed: int) -> list[Content]:
    """`count` contents of one split in random order, in rounds that show each moving combination once and each still one twice.

    Only a ninth of the combinations stands still; of what is drawn it is a fifth.
    """
    pool = [c for c in all_contents() if c.held_out == held_out]
    pool += [c for c in pool if c.direction is None]
    rng = np.random.default_rng([seed, int(held_out)])
    rounds = [rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))]
    return [pool[i] for i in np.concatenate(rounds)[:count]]


def render(content: Content, style: str, rng: np.random.Generator) -> Clip:
    """One clip of `content`: the caption fixes what is shown, `rng` fixes place, exact speed and background tones."""
    if style not in STYLES:
        raise ValueError(f"Expected a style among {', '.join(STYLES)}, found {style!r}.")
    radius = RADII[content.size]
    velocity = np.asarray(content.velocity) * (1 + rng.uniform(-_SPEED_SPREAD, _SPEED_SPREAD))
    way = velocity * (FRAMES - 1)
    margin = radius * np.array(_EXTENT[content.shape])  # left/right, above, below of the centre
    low = np.array([margin[0], margin[1]]) + 2 - np.minimum(way, 0)
    high = SIDE - 2 - np.array([margin[0], margin[2]]) - np.maximum(way, 0)
    centres = rng.uniform(low, high) + velocity * np.arange(FRAMES)[:, None]

    ground = _GROUNDS[style](_pattern(content.background, rng), rng)
    draw = _DRAW[style]
    frames = np.stack([draw(ground, content, radius, centre, velocity) for centre in centres])
    return Clip((np.clip(frames, 0, 1) * 255).round().astype(np.uint8), content, centres, velocity)


def render_split(count: int, *, style: str, held_out: bool, seed: int):
    """Yields `count` clips of a split; the i-th depends on (seed, i) alone."""
    for i, content in enumerate(draw_contents(count, held_out=held_out, seed=seed)):
        yield render(content, style, np.random.default_rng([seed, i, STYLES.index(style)]))


# ---- drawing: all masks are coverages in 0..1, antialiased from signed distances in pixels ----

_Y, _X = np.mgrid[0:SIDE, 0:SIDE] + 0.5
# Half width, reach above and reach below the centre, in radii.
_EXTENT = {"circle": (1.0, 1.0, 1.0), "square": (0.89, 0.89, 0.89), "triangle": (1.26, 1.45, 0.725)}


def _coverage(distance: np.ndarray) -> np.ndarray:
    return np.clip(0.5 - distance, 0, 1)


def shape_distance(shape: str, radius: float, centre) -> np.ndarray:
    """Signed distance (H, W) in pixels to the outline of a shape, negative inside."""
    x, y = _X - centre[0], _Y - centre[1]
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.89 * radius
    # An equilateral triangle, apex up: the largest distance to its three sides.
    return np.maximum(y, np.abs(x) * np.sqrt(3) / 2 - y / 2) - 0.725 * radius


def _lamp(radius: float, centre, velocity) -> np.ndarray:
    speed = np.hypot(*velocity)
    if speed == 0:
        return np.zeros((SIDE, SIDE))
    x, y = np.asarray(centre) + 0.45 * radius * velocity / speed
    return _coverage(np.hypot(_X - x, _Y - y) - 0.33 * radius)


def _behind(centre, velocity):
    """(along, across): pixels behind the centre against the motion, and distance from the line of motion."""
    ux, uy = velocity / np.hypot(*velocity)
    x, y = _X - centre[0], _Y - centre[1]
    return -(x * ux + y * uy), np.abs(x * uy - y * ux)


def _tail(radius: float, centre, velocity, stripes: bool) -> np.ndarray:
    speed = np.hypot(*velocity)
    if speed == 0:
        return np.zeros((SIDE, SIDE))
    along, across = _behind(centre, velocity)
    reach = 0.6 * radius + TAIL_FRAMES * speed
    fade = np.clip((reach - along) / (TAIL_FRAMES * speed), 0, 1) * (along > 0)
    if stripes:
        return _coverage(np.abs(across - 0.42 * radius) - 1.2) * fade
    return 0.6 * _coverage(across - 0.55 * radius) * fade


def _pattern(background: str, rng: np.random.Generator) -> np.ndarray:
    """(H, W) in 0..1: constant, a ramp, stripes or checks."""
    if background == "plain":
        return np.full((SIDE, SIDE), 0.5)
    if background == "graded":
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (_X - SIDE / 2) * np.cos(angle) + (_Y - SIDE / 2) * np.sin(angle)
        return (ramp - ramp.min()) / np.ptp(ramp)
    period, (px, py) = rng.uniform(14, 18), rng.uniform(0, 18, 2)
    wave_x, wave_y = (np.clip(3 * np.sin(2 * np.pi * (axis + p) / period), -1, 1) for axis, p in ((_X, px), (_Y, py)))
    if background == "striped":
        wave = wave_x if rng.random() < 0.5 else wave_y
    else:
        wave = wave_x * wave_y
    return (wave + 1) / 2


def _plain_ground(pattern: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    low = rng.uniform(0.18, 0.30)
    tone = low + rng.uniform(0.22, 0.32) * pattern
    return np.repeat(tone[..., None], 3, -1)


def _neon_ground(pattern: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dark, light = np.array([0.02, 0.02, 0.06]), np.array([0.16, 0.10, 0.30])
    return dark + rng.uniform(0.75, 1.0) * pattern[..., None] * (light - dark)


def _blend(frame: np.ndarray, colour, alpha: np.ndarray) -> np.ndarray:
    return frame + alpha[..., None] * (np.asarray(colour) - frame)


def _draw_plain(ground, content, radius, centre, velocity) -> np.ndarray:
    colour = COLOURS[content.colour]
    frame = _blend(ground, colour, _tail(radius, centre, velocity, stripes=False))
    frame = _blend(frame, colour, _coverage(shape_distance(content.shape, radius, centre)))
    return _blend(frame, (1, 1, 1), _lamp(radius, centre, velocity))


def _draw_neon(ground, content, radius, centre, velocity) -> np.ndarray:
    """The same content as a glowing tube on a night ground: an outline in place of a fill, lines in place of a tail."""
    colour = np.asarray(COLOURS[content.colour])
    distance = shape_distance(content.shape, radius, centre)
    frame = _blend(ground, colour, _tail(radius, centre, velocity, stripes=True))
    frame = frame + 0.25 * np.exp(-np.clip(distance, 0, None) / 3)[..., None] * colour
    frame = _blend(frame, (0.02, 0.02, 0.06), _coverage(distance))
    frame = _blend(frame, np.minimum(colour * 1.08, 1), _coverage(np.abs(distance + 1.6) - 1.6))
    return _blend(frame, (1, 1, 1), _lamp(radius, centre, velocity))


_GROUNDS = {"plain": _plain_ground, "neon": _neon_ground}
_DRAW = {"plain": _draw_plain, "neon": _draw_neon}
_CONTENT_OF = {content.caption: content for content in all_contents()}
