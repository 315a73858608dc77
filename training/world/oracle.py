"""The oracle: reads what a clip of the miniature world shows, by image processing alone.

Every word of the caption grammar is read from the pixels, frame by frame, and stands for the clip only if most frames agree.
What cannot be read is wrong, never left out: a clip without a trackable shape fails every attribute of that shape.

The thresholds lie between what rendered clips give after blur, noise and H.264 and what damaged shapes give; the tests hold
them to both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange, reduce

from training.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    RADII,
    SHAPES,
    SIDE,
    SPEEDS,
    Content,
    shape_distance,
)

UNCLEAR = "unclear"  # a direction: the shape moves, but not steadily along one of the four
ATTRIBUTES = ("size", "colour", "shape", "motion", "background")

_AGREE = 0.75  # fraction of the frames that must agree on an attribute, and must show a shape at all
_PEAK_CHROMA = 0.3  # below this colourfulness (0..1) of its most colourful pixels a clip shows no shape
_BODY_CHROMA = 0.58  # of the peak: about the plain tail where it starts (0.6, fading), below a softened outline
_LAMP_LEVEL = 0.75  # darkest channel: above every ground (0.62)
_SMALLEST_SHARE = 0.2  # of the body that must be colourful; the outline alone is 0.45 and more
_SMALLEST_LAMP = 6  # pixels; the smallest rendered one has 22
_SMALLEST_BODY, _LARGEST_BODY = 60, 900  # pixels; rendered ones have 175 to 460
_SOFTNESS = 1.5  # pixels: width of a template's edge
_FIT_ROUNDS = 3  # of measuring place and radius, each without what the last one took for tail
_MATCH_GAP = 1.6  # pixels: twice the mean distance allowed between the outlines of shape and template, roughly
_FRAME_GAP = 2.2  # the same for a single frame
_MATCH_LEAD = 0.03  # by which the best template's match must exceed the next one's
_SIZE_TOLERANCE = 0.2
_HUE_COSINE = np.cos(np.deg2rad(24))  # the colours of the world lie 47 degrees of hue or more apart
_HUE_SHARE = 0.7
_STILL_SPEED = 0.75  # pixels a frame, half of "slowly"
_SPEED_TOLERANCE = 0.45  # "slowly" and "fast" meet at about this relative error
_STILL_SPREAD = 1.5  # pixels RMS about the mean, in each axis
_STEADINESS = 0.9  # correlation of place and time; 8 frames in random order reach it in 0.2% of cases
_AXIS_RATIO = 0.5  # largest speed across, relative to the speed along
_GROUND_REACH = 0.3  # of the peak chroma: whatever is more colourful is shape or tail
_BLOCK = 4  # pixels: backgrounds are read from block means
_FLAT = 0.014  # standard deviation of a plain background's blocks, at most; up to 0.007 rendered, 0.022 and more for others
_TINT = 0.045  # blue minus green; up to 0.005 in the plain style, 0.087 and more in the neon one
_NIGHT = 0.2  # mean level of the ground; up to 0.13 in the neon style, 0.28 and more in the plain one
_EXPLAINED = 0.7  # fraction of a background's variance that its pattern must explain; 0.9 and more rendered
_OUTLINE = 0.5  # brightness inside relative to the outline: below it the shape is a tube, above it is filled


@dataclass(frozen=True)
class Reading:
    """What a clip shows.

    A word is None where it cannot be read. `direction` and `speed` are both None for a shape that stands still; `direction` is
    `UNCLEAR` for one that neither stands nor moves steadily, and for a clip without a shape (`found` False). `speed` is None
    also for a speed that no word names. `stroke` (filled or outlined shape) and `palette` (grey or night ground) are each the
    style they look like; `style` is the style if both say the same.

    `velocity` (2,) in pixels a frame, y pointing down; `centres` (F, 2) in pixels (x, y), NaN in frames without a shape;
    `jerk`, the mean length of the second difference of the centres, in pixels; NaN where there is nothing to measure.
    `consistency` maps size, colour, shape, background, stroke and palette to the fraction of the frames that say the commonest word.
    """

    size: str | None
    colour: str | None
    shape: str | None
    direction: str | None
    speed: str | None
    background: str | None
    stroke: str | None
    palette: str | None
    velocity: np.ndarray
    centres: np.ndarray
    jerk: float
    consistency: dict[str, float]

    @property
    def found(self) -> bool:
        """True if a shape could be tracked."""
        return bool(np.isfinite(self.velocity).all())

    @property
    def style(self) -> str | None:
        return self.stroke if self.stroke == self.palette else None


def read_clip(frames: np.ndarray) -> Reading:
    """Reads a clip: uint8 frames (F, 64, 64, 3), at least 3 of them. ValueError for any other array."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (SIDE, SIDE, 3) or len(frames) < 3:
        raise ValueError(
            f"Expected uint8 frames of shape (3 or more, {SIDE}, {SIDE}, 3), found {frames.dtype} of shape {frames.shape}; "
            "decode and resize the clip first."
        )
    rgb = rearrange(frames, "f h w c -> c f h w").astype(np.float32) / 255
    chroma, darkest = _chroma_and_darkest(rgb)
    levels = np.bincount((chroma * 255 + 0.5).ravel().astype(np.uint8))
    peak = np.searchsorted(np.cumsum(levels), 0.99 * chroma.size) / 255  # the 99th percentile
    colourful = chroma > _BODY_CHROMA * peak
    body = _bodies(colourful, darkest > _LAMP_LEVEL)
    area = body.sum((1, 2))
    found = (area >= _SMALLEST_BODY) & (area <= _LARGEST_BODY) & (peak >= _PEAK_CHROMA)
    found &= (body & colourful).sum((1, 2)) >= _SMALLEST_SHARE * area
    background, palette = _read_ground(rgb, peak)
    votes = {name: [None] for name in ("size", "colour", "shape", "stroke")}
    votes |= {"background": background, "palette": palette}
    centres = np.full((len(frames), 2), np.nan)
    if found.mean() >= _AGREE:
        read, centres[found] = _read_bodies(rgb[:, found], body[found])
        votes |= {name: words + [None] * int((~found).sum()) for name, words in read.items()}
    agreed = {name: _majority(words) for name, words in votes.items()}
    velocity, direction, speed = _read_motion(centres)
    bends = np.diff(centres, n=2, axis=0)
    bends = np.hypot(*bends[np.isfinite(bends).all(1)].T)
    jerk = float(bends.mean()) if len(bends) else float("nan")
    return Reading(
        **{name: word for name, (word, _) in agreed.items()},
        direction=direction,
        speed=speed,
        velocity=velocity,
        centres=centres,
        jerk=jerk,
        consistency={name: share for name, (_, share) in agreed.items()},
    )


def judge(reading: Reading, content: Content) -> dict[str, bool]:
    """Which attributes of `content` a clip shows: one entry for each of ATTRIBUTES and 'all'. Motion is direction and speed."""
    verdict = {name: getattr(reading, name) == getattr(content, name) for name in ATTRIBUTES if name != "motion"}
    verdict["motion"] = (reading.direction, reading.speed) == (content.direction, content.speed)
    return verdict | {"all": all(verdict.values())}


def motion_error(reading: Reading, content: Content) -> float:
    """Length in pixels a frame of the difference between measured and captioned velocity; without a shape, that of a shape
    that moves the opposite way (for one that should stand still: as fast as the fastest)."""
    nominal = np.asarray(content.velocity)
    if reading.found:
        return float(np.hypot(*(reading.velocity - nominal)))
    return float(2 * np.hypot(*nominal)) or max(SPEEDS.values())


# ---- frame by frame; a vote is a word or None ----


def _bodies(colourful: np.ndarray, lamp: np.ndarray) -> np.ndarray:
    """Roughly the shape's mask (F, H, W) in every frame: lamp and interior filled, tails cut off, the largest piece."""
    from scipy import ndimage  # here, so that whoever reads no clips needs none

    body = np.pad(colourful | lamp, ((0, 0), (2, 2), (2, 2)))
    body = ndimage.binary_fill_holes(ndimage.binary_closing(body, _DISK), _CROSS)
    pieces, count = ndimage.label(ndimage.binary_opening(body, _DISK)[:, 2:-2, 2:-2], _CROSS)
    areas = np.bincount((pieces + np.arange(len(body))[:, None, None] * (count + 1)).ravel(), minlength=len(body) * (count + 1))
    areas = areas.reshape(len(body), -1)
    areas[:, 0] = 0
    return (pieces == areas.argmax(1)[:, None, None]) & (pieces > 0)


def _chroma_and_darkest(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    darkest = np.minimum(np.minimum(rgb[0], rgb[1]), rgb[2])
    return np.maximum(np.maximum(rgb[0], rgb[1]), rgb[2]) - darkest, darkest


def _moments(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area and centre (x, y) of every mask (F, h, w), whose columns are at `x` and rows at `y`."""
    columns, rows = mask.sum(1), mask.sum(2)
    area = np.maximum(rows.sum(1), 1)
    return area, columns @ x / area, rows @ y / area


def _read_bodies(rgb: np.ndarray, body: np.ndarray) -> tuple[dict[str, list[str | None]], np.ndarray]:
    """Votes on shape, size, colour and stroke, and centres (F, 2), from frames (3, F, H, W) with a shape's mask (F, H, W)."""
    # From here on a window around every body; its pixels' coordinates are those of _WINDOW_X and _WINDOW_Y.
    _, x, y = _moments(body, _PIXEL, _PIXEL)
    corner = np.stack([x, y]).astype(int)
    cuts = [(f, slice(j, j + _WINDOW), slice(i, i + _WINDOW)) for f, (i, j) in enumerate(corner.T)]
    margin = (_WINDOW // 2,) * 2
    rgb = np.pad(rgb, ((0, 0), (0, 0), margin, margin))
    rgb = np.stack([rgb[(slice(None), *cut)] for cut in cuts], 1)
    body = np.pad(body, ((0, 0), margin, margin))
    body = np.stack([body[cut] for cut in cuts])
    chroma, darkest = _chroma_and_darkest(rgb)
    brightest = chroma + darkest
    lamp = darkest > _LAMP_LEVEL

    fits = _fit_templates(_colour_amount(rgb, body, chroma, lamp), body, _heading(body, lamp))
    best = max(range(len(fits)), key=lambda i: fits[i][0])
    lead = fits[best][0] - max(fit[0] for i, fit in enumerate(fits) if i != best)
    match, frame_match, x, y, radius, distance = fits[best]
    centres = np.stack([x, y], 1) - (_WINDOW_FROM + _WINDOW // 2) + corner.T
    clear = match >= 1 - _MATCH_GAP / radius.mean() and lead >= _MATCH_LEAD
    shape = clear & (frame_match >= 1 - _FRAME_GAP / radius)

    sizes = list(RADII)
    error = np.abs(radius[:, None] / np.array([RADII[s] for s in sizes]) - 1)
    size = np.where(error.min(1) <= _SIZE_TOLERANCE, error.argmin(1), -1)

    # The hue that most of the body has, every pixel as far as it is colourful.
    frame = np.nonzero(body)[0]
    hue = rgb[:, body] - rgb[:, body].mean(0)
    near = _HUES @ hue > _HUE_COSINE * np.sqrt((hue**2).sum(0))
    share = np.stack([np.bincount(frame, chroma[body] * n, len(body)) for n in near])
    share /= np.maximum(np.bincount(frame, chroma[body], len(body)), 1e-6)
    colour = np.where(share.max(0) >= _HUE_SHARE, share.argmax(0), -1)

    inside = body & (distance < np.minimum(-4.0, 0.75 * distance.min((1, 2)))[:, None, None]) & (darkest < 0.35)
    rim = body & (np.abs(distance + 1.6) < 1.2)
    outlined = _mean(brightest, inside) < _OUTLINE * _mean(brightest, rim)
    return {
        "shape": [SHAPES[best] if ok else None for ok in shape],
        "size": [sizes[i] if i >= 0 else None for i in size],
        "colour": [list(COLOURS)[i] if i >= 0 else None for i in colour],
        "stroke": ["neon" if tube else "plain" for tube in outlined],
    }, centres


def _heading(body: np.ndarray, lamp: np.ndarray) -> np.ndarray:
    """Unit (x, y) vector along the axis on which the lamp lies off the middle, zero without a lamp: the tail is opposite."""
    _, x, y = _moments(body, _PIXEL[:_WINDOW], _PIXEL[:_WINDOW])
    area, lamp_x, lamp_y = _moments(body & lamp, _PIXEL[:_WINDOW], _PIXEL[:_WINDOW])
    lit = area >= _SMALLEST_LAMP
    if lit.mean() < 0.5:
        return np.zeros(2)
    offset = np.array([(lamp_x - x)[lit].mean(), (lamp_y - y)[lit].mean()])
    return np.sign(offset) * (np.abs(offset) == np.abs(offset).max())


def _colour_amount(rgb, body, chroma, lamp) -> np.ndarray:
    """How much of the shape's own colour every pixel (F, h, w) has: 0 on grey, 1 in the shape and its lamp."""
    hue = rgb[:, body & (chroma > 0.2)].sum(1)
    hue = hue - hue.mean()
    amount = np.tensordot((hue / np.linalg.norm(hue)).astype(np.float32), rgb, 1)
    return np.where(lamp, np.float32(1), amount / np.quantile(amount[body & ~lamp], 0.8))


def _fit_templates(amount, body, heading) -> list[tuple]:
    """For every shape the best template: match of the whole clip, match (F,) of the frames, x, y and radius (F,), and the
    signed distance (F, h, w) to its outline.

    A match is one minus the area between shape and template, relative to the template's: 1 if they agree. The whole clip's is
    that of its mean frame in the shape's own coordinates, where noise averages out.
    """
    from scipy import ndimage

    inner = ndimage.binary_erosion(body, _SQUARE)
    outer = ndimage.maximum_filter(body, (1, 7, 7))
    side = np.clip((amount - 0.3) / 0.4, 0, 1)
    rear = np.clip((amount - 0.65) / 0.25, 0, 1)  # the plain tail reaches 0.6
    side, rear = (np.where(inner, 1, np.where(outer, m, 0)).astype(np.float32) for m in (side, rear))
    area, x0, y0 = _moments(body, _WINDOW_X, _WINDOW_Y)
    fits = []
    for name, unit in zip(SHAPES, _UNIT_AREA, strict=True):
        x, y, radius = x0, y0, np.sqrt(area / unit)
        for _ in range(_FIT_ROUNDS):
            px, py, r = x[:, None, None], y[:, None, None], radius[:, None, None]
            distance = shape_distance(name, r, (px, py))[:, _CUT, _CUT].astype(np.float32)
            template = np.clip(0.5 - distance / _SOFTNESS, 0, 1)
            shown = side
            if heading.any():
                along = (px - _WINDOW_X) * heading[0] + (py - _WINDOW_Y[:, None]) * heading[1]
                across = np.abs((px - _WINDOW_X) * heading[1] + (py - _WINDOW_Y[:, None]) * heading[0])
                behind = (along > 0) & (across < 0.55 * r + 1.5)
                # The stripes of a neon tail are as bright as the outline: outside the template they do not count.
                stripe = behind & (np.abs(across - 0.42 * r) < 2.2)
                shown = np.where(behind, rear, side)
                shown = np.where(stripe, np.minimum(shown, template), shown)
            area_shown, x, y = _moments(shown, _WINDOW_X, _WINDOW_Y)
            radius = np.sqrt(area_shown / unit)
        gap = shown - template
        size = template.sum((1, 2))
        match = 1 - np.abs(gap.mean(0)).sum() / size.mean()
        fits.append((match, 1 - np.abs(gap).sum((1, 2)) / size, x, y, radius, distance))
    return fits


def _read_ground(rgb: np.ndarray, peak: float) -> tuple[list[str | None], list[str | None]]:
    """Votes on background and palette from (3, F, H, W) colours, at least two blocks away from the shape and its tail."""
    from scipy import ndimage

    colour = reduce(rgb, "c f (y by) (x bx) -> c f y x", "mean", by=_BLOCK, bx=_BLOCK)
    shown = (np.ptp(colour, 0) > max(_GROUND_REACH * peak, 0.22)) | (colour.min(0) > _LAMP_LEVEL)
    free = ~ndimage.maximum_filter(shown, (1, 5, 5))
    free = rearrange(free, "f y x -> f (y x)").astype(np.float64)
    colour = rearrange(colour, "c f y x -> c f (y x)")
    count = np.maximum(free.sum(1), 1)
    mean = (colour * free).sum(2) / count  # (3, F)
    tone = np.einsum("c,cfp->fp", _TONE, colour - mean[..., None]) * free
    variance = (tone**2).sum(1) / count

    # Weighted least squares of every pattern at once; the ridge makes the padded columns harmless.
    gram = rearrange(free @ _PATTERN_PRODUCTS, "f (p i j) -> f p i j", i=5, j=5) + 1e-6 * np.eye(5)
    moment = rearrange(tone @ _PATTERN_BASES, "f (p i) -> f p i", i=5)
    fit = np.linalg.solve(gram, moment[..., None])[..., 0]
    explained = (fit * moment).sum(2) / np.maximum((tone**2).sum(1), 1e-9)[:, None]
    best = explained.argmax(1)

    background, palette = [], []
    for f in range(len(free)):
        if free[f].sum() < 20:
            word = None
        elif np.sqrt(variance[f]) < _FLAT:
            word = "plain"
        else:
            word = _PATTERN_NAMES[best[f]] if explained[f, best[f]] >= _EXPLAINED else None
        background.append(word)
        tint, light = mean[2, f] - mean[1, f], mean[:, f].mean()
        palette.append("plain" if light >= _NIGHT and tint < _TINT else "neon" if light < _NIGHT and tint > _TINT else None)
    return background, palette


def _majority(votes: Sequence[str | None]) -> tuple[str | None, float]:
    """The word that enough frames agree on, or None, and the fraction that has the commonest word; 0 if no frame has one."""
    words = [vote for vote in votes if vote is not None]
    word = max(words, key=words.count, default=None)
    share = words.count(word) / len(votes)
    return (word if share >= _AGREE else None), share


def _read_motion(centres: np.ndarray) -> tuple[np.ndarray, str | None, str | None]:
    """Velocity (2,), direction and speed of a track (F, 2); NaN and UNCLEAR without one."""
    seen = np.isfinite(centres).all(1)
    if not seen.any():
        return np.full(2, np.nan), UNCLEAR, None
    time = np.flatnonzero(seen) - np.flatnonzero(seen).mean()
    place = centres[seen] - centres[seen].mean(0)
    velocity = time @ place / (time @ time)
    speed = np.hypot(*velocity)
    spread = np.sqrt((place**2).mean(0))
    if speed < _STILL_SPEED:
        return velocity, (None if spread.max() < _STILL_SPREAD else UNCLEAR), None
    along = np.abs(velocity).argmax()
    steadiness = np.abs(time @ place[:, along]) / np.sqrt((time @ time) * (place[:, along] @ place[:, along]))
    if steadiness < _STEADINESS or np.abs(velocity[1 - along]) > _AXIS_RATIO * np.abs(velocity[along]):
        return velocity, UNCLEAR, None
    direction = max(DIRECTIONS, key=lambda name: velocity @ DIRECTIONS[name])
    word = min(SPEEDS, key=lambda name: abs(np.log(speed / SPEEDS[name])))
    return velocity, direction, (word if abs(speed / SPEEDS[word] - 1) <= _SPEED_TOLERANCE else None)


def _mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (values * mask).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)


# ---- tables ----

_SQUARE = np.ones((1, 3, 3), bool)
_FROM_CENTRE = np.abs(np.arange(-2, 3))
_DISK = (_FROM_CENTRE[:, None] + _FROM_CENTRE < 4)[None]  # 5 x 5 without its corners
_CROSS = np.zeros((3, 3, 3), bool)  # neighbours within a frame, so that frames are treated apart in one call
_CROSS[1] = _FROM_CENTRE[1:4, None] + _FROM_CENTRE[1:4] < 2
_PIXEL = np.arange(SIDE) + 0.5
_WINDOW = 44  # pixels: holds the largest shape, 20% too large and off by a few pixels
_WINDOW_FROM = (SIDE - _WINDOW) // 2  # windows lie in the middle of the frame, so that shape_distance draws in them
_CUT = slice(_WINDOW_FROM, _WINDOW_FROM + _WINDOW)
_WINDOW_X = _WINDOW_Y = _PIXEL[_CUT]
_UNIT_AREA = np.array([(shape_distance(s, 16.0, (32.0, 32.0)) < 0).sum() / 16**2 for s in SHAPES])
_HUES = np.array(list(COLOURS.values()), np.float32)
_HUES = _HUES - _HUES.mean(1, keepdims=True)
_HUES /= np.linalg.norm(_HUES, axis=1, keepdims=True)
_TONE = np.array([0.25, 0.15, 0.60])  # weights that give the grounds of both styles about the same contrast


def _patterns() -> tuple[list[str], np.ndarray]:
    """Names and bases (P, blocks, 5), padded with zeros, of every background but the plain one."""
    y, x = (np.mgrid[0 : SIDE // _BLOCK, 0 : SIDE // _BLOCK].reshape(2, -1) + 0.5) * _BLOCK
    one = np.ones_like(x)
    bases = [(BACKGROUNDS[1], [one, x / SIDE - 0.5, y / SIDE - 0.5])]
    for period in np.arange(13.5, 19.0, 0.5):
        wave = [[f(2 * np.pi * axis / period) for f in (np.cos, np.sin)] for axis in (x, y)]
        bases += [(BACKGROUNDS[2], [one, *pair]) for pair in wave]
        bases += [(BACKGROUNDS[3], [one, *(a * b for a in wave[0] for b in wave[1])])]
    names = [name for name, _ in bases]
    return names, np.stack([np.stack(columns + [0 * one] * (5 - len(columns)), -1) for _, columns in bases])


_PATTERN_NAMES, _bases = _patterns()
_PATTERN_PRODUCTS = rearrange(np.einsum("pbi,pbj->bpij", _bases, _bases), "b p i j -> b (p i j)")
_PATTERN_BASES = rearrange(_bases, "p b i -> b (p i)")
