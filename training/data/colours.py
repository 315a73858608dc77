"""From a decoded video frame to 8-bit RGB as an ordinary screen shows it."""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

# Code points of ITU-T H.273.
_SWSCALE = (
    0,
    1,
    2,
    4,
    5,
    6,
    7,
    9,
)  # matrices that FFmpeg converts by itself: RGB, BT.709, none said, FCC, BT.601 (2), SMPTE 240M, BT.2020
_YCGCO, _BT2020_CL = 8, 10
_UNSAID, _PQ, _HLG = 2, 16, 18
# Curves that a screen shows alike: BT.709, none said, gammas, BT.601, SMPTE 240M, xvYCC, BT.1361, sRGB, BT.2020; 0 and 3 are reserved.
_ORDINARY = (0, 1, _UNSAID, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
_TO_709 = {  # linear light of other primaries, by their code point (ITU-R BT.2087; SMPTE EG 432-1)
    9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
}
_WHITE = 203.0  # cd/m2 of a white sheet in HDR (ITU-R BT.2408)
_PEAK = 1000.0  # cd/m2 that come out as the brightest of SDR
_KNEE = 0.8  # of white: what is darker keeps its light


class ColourError(ValueError):
    """A frame in colours that are not read; the message names them."""


def to_rgb(frame: "av.VideoFrame") -> np.ndarray:
    """(H, W, 3) uint8 of a frame, by the matrix and the transfer curve that it declares; HDR (PQ, HLG) is tone-mapped.

    ColourError for colours that neither FFmpeg nor this knows, and for curves that are not made for a screen (linear, log).
    """
    matrix, curve = int(frame.colorspace), int(frame.color_trc)
    hdr = curve in (_PQ, _HLG)
    if matrix not in (*_SWSCALE, _YCGCO, _BT2020_CL) or (hdr and matrix in (_YCGCO, _BT2020_CL)):
        raise ColourError(f"a colour matrix that is not known (H.273 number {matrix}{', HDR' if hdr else ''})")
    if not hdr and curve not in _ORDINARY:
        names = {8: "linear light", 9: "a log curve", 10: "a log curve", 17: "SMPTE ST 428"}
        raise ColourError(f"a transfer curve of no screen, {names.get(curve, 'not known')} (H.273 number {curve})")
    if curve == _UNSAID and any(data.type.name == "DOVI_METADATA" for data in frame.side_data):
        raise ColourError("Dolby Vision without an ordinary picture below it (profile 5)")
    if hdr:
        return tone_mapped(frame.to_ndarray(format="rgb48le"), "PQ" if curve == _PQ else "HLG", int(frame.color_primaries))
    if matrix == _YCGCO:
        return _bytes(ycgco_to_rgb(*_planes(frame)))
    if matrix == _BT2020_CL:
        return _bytes(constant_luminance_to_rgb(*_planes(frame)))
    return frame.to_ndarray(format="rgb24")


def _planes(frame: "av.VideoFrame") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Luma of 0 to 1 and two differences of -0.5 to 0.5, (H, W) each."""
    full = int(frame.color_range) == 2
    frame.colorspace = 1  # FFmpeg does not convert, but it refuses a matrix that it could not
    y, *chroma = np.moveaxis(frame.to_ndarray(format="yuv444p16le").astype(np.float32), -1, 0)
    if full:
        return y / 65535, *((c - 32768) / 65535 for c in chroma)
    return (y - 16 * 256) / (219 * 256), *((c - 128 * 256) / (224 * 256) for c in chroma)


def ycgco_to_rgb(y: np.ndarray, cg: np.ndarray, co: np.ndarray) -> np.ndarray:
    """(H, W, 3) of 0 to 1 (ITU-T H.273, equations 53 to 56)."""
    return np.stack([y - cg + co, y + cg, y - cg - co], -1)


def constant_luminance_to_rgb(y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> np.ndarray:
    """(H, W, 3) of 0 to 1: BT.2020 with its luma from linear light (ITU-R BT.2020-2, table 4)."""
    blue = y + cb * np.where(cb <= 0, 1.9404, 1.5816)
    red = y + cr * np.where(cr <= 0, 1.7184, 0.9938)
    light = _light(y) - 0.2627 * _light(red) - 0.0593 * _light(blue)
    return np.stack([red, _signal(light / 0.6780), blue], -1)


def _signal(light: np.ndarray) -> np.ndarray:
    """BT.709's curve, which is BT.2020's too, of light from 0."""
    light = np.clip(light, 0, None)
    return np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


def _light(signal: np.ndarray) -> np.ndarray:
    signal = np.clip(signal, 0, None)
    return np.where(signal < 0.081, signal / 4.5, ((signal + 0.099) / 1.099) ** (1 / 0.45))


def tone_mapped(rgb: np.ndarray, curve: str, primaries: int = 9) -> np.ndarray:
    """(H, W, 3) uint16 of an HDR signal -> uint8 of BT.709: a white sheet comes out nearly white, what is brighter is compressed."""
    linear = _table(curve)[rgb]
    if curve == "HLG":  # its display is relative to the scene's luminance (ITU-R BT.2100, table 5)
        luminance = linear @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        linear = linear * 1000 * luminance[..., None] ** 0.2
    linear = linear / _WHITE
    # Primaries that are not said are BT.2020's, which both curves come with.
    matrix = _TO_709.get(9 if primaries == _UNSAID else primaries)
    if matrix is not None:
        linear = np.clip(linear @ np.array(matrix, np.float32).T, 0, None)
    brightest = linear.max(-1, keepdims=True)
    return _bytes(_signal(linear * (_compressed(brightest) / np.maximum(brightest, 1e-6))))


def _compressed(light: np.ndarray) -> np.ndarray:
    """Light (white is 1) up to the peak, in 0 to 1: as it is up to the knee, above by Reinhard's extended curve, smoothly."""
    above, most = (np.maximum(light, _KNEE) - _KNEE) / (1 - _KNEE), (_PEAK / _WHITE - _KNEE) / (1 - _KNEE)
    return np.where(light < _KNEE, light, _KNEE + (1 - _KNEE) * np.minimum(above * (1 + above / most**2) / (1 + above), 1))


@cache
def _table(curve: str) -> np.ndarray:
    """(65536,) float32: of PQ the light in cd/m2, of HLG the scene's light of 0 to 1 (ITU-R BT.2100, tables 4 and 5)."""
    signal = np.linspace(0, 1, 65536)
    if curve == "PQ":
        power = signal ** (32 / 2523)
        light = 10_000 * (np.clip(power - 107 / 128, 0, None) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)
    else:
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return light.astype(np.float32)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values * 255, 0, 255).round().astype(np.uint8)
