import av
import numpy as np
import pytest

from tests.training.data.conftest import FILES, encode_planes
from training.data.colours import ColourError, to_rgb, tone_mapped
from training.data.video import VideoError, read_video

PALETTE = np.array(
    [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [0.9, 0.1, 0.1], [0.1, 0.8, 0.3], [0.2, 0.3, 0.9], [1, 1, 0], [0, 1, 1]]
)


def pq(light):
    """The signal of a luminance in cd/m2 (SMPTE ST 2084, the inverse curve)."""
    power = (np.asarray(light) / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light):
    """The signal of a scene's light of 0 to 1 (ARIB STD-B67)."""
    light = np.asarray(light, float)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(light <= 1 / 12, np.sqrt(3 * light), a * np.log(np.maximum(12 * light - b, 1e-9)) + c)


def curve_709(light):
    return np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


def codes(signal):
    return np.round(np.asarray(signal)[None] * 65535).astype(np.uint16)


def planes(y, first, second, depth=8):
    """(3, 64, 32 * colours) of video range, a square a colour; differences of -0.5 to 0.5."""
    scale, kind = (1, np.uint8) if depth == 8 else (256, np.uint16)
    values = [(16 + 219 * y) * scale, *((128 + 224 * c) * scale for c in (first, second))]
    return np.stack([np.round(v).astype(kind).repeat(32)[None].repeat(64, 0) for v in values])


def squares(picture):
    return picture[32, 16::32]


# ---- HDR ----


def test_pq_keeps_the_light_of_what_is_darker_than_white():
    light = np.array([0.0, 1.0, 20.0, 100.0, 160.0])
    grey = np.stack([pq(light)] * 3, -1)
    assert np.abs(tone_mapped(codes(grey), "PQ")[0] - 255 * curve_709(light / 203)[:, None]).max() <= 1


def test_a_white_sheet_is_nearly_white_and_what_is_brighter_still_tells_apart():
    light = np.array([203.0, 400.0, 700.0, 1000.0, 4000.0])
    out = tone_mapped(codes(np.stack([pq(light)] * 3, -1)), "PQ")[0, :, 0].astype(int)
    assert 235 <= out[0] < out[1] < out[2] < out[3] == out[4] == 255


def test_hlg_and_pq_of_the_same_light_are_the_same():
    scene = np.array([0.02, 0.1, 0.265, 0.5, 1.0])
    light = 1000 * scene**1.2  # of a grey, on a display of 1000 cd/m2 (BT.2100)
    both = [tone_mapped(codes(np.stack([signal] * 3, -1)), kind) for signal, kind in ((hlg(scene), "HLG"), (pq(light), "PQ"))]
    assert np.abs(both[0].astype(int) - both[1]).max() <= 1
    assert abs(float(hlg(0.265)) - 0.75) < 0.01  # reference white


def test_colours_of_the_wide_primaries_come_out_as_they_are_seen():
    """A red that BT.709 knows, written in BT.2020's primaries (BT.2087, table 2)."""
    light = 100 * np.array([0.6274, 0.0691, 0.0164])
    red = tone_mapped(codes(pq(light)[None]), "PQ")[0, 0]
    assert np.abs(red.astype(int) - [round(255 * float(curve_709(100 / 203))), 0, 0]).max() <= 4
    plain = tone_mapped(codes(pq(np.array([100.0, 0, 0]))[None]), "PQ", primaries=1)[0, 0]
    assert np.abs(plain.astype(int) - [round(255 * float(curve_709(100 / 203))), 0, 0]).max() <= 1


@pytest.mark.parametrize(
    ("codec", "suffix", "fmt"),
    [("ffv1", "mkv", "yuv444p16le"), ("libx265", "mp4", "yuv444p"), ("libvpx-vp9", "webm", "yuv444p")],
)
@pytest.mark.parametrize("curve", [16, 18])
def test_hdr_videos_of_several_codecs(tmp_path, codec, suffix, fmt, curve):
    signal = np.array([0.0, float(pq(100)), float(pq(203))] if curve == 16 else [0.0, float(hlg(0.147)), 0.75])
    zero = np.zeros(3)
    path = encode_planes(
        tmp_path / f"x.{suffix}", planes(signal, zero, zero, 16 if "16" in fmt else 8), fmt, codec, curve=curve
    )
    shown = squares(read_video(path, 2)[0]).astype(int)
    assert (
        np.abs(shown[0]).max() <= 2
        and np.abs(shown[1] - 255 * float(curve_709(100 / 203))).max() <= 4
        and shown[2].min() >= 235
    )


def test_a_phones_hdr_video():
    frame = read_video(FILES / "hdr_pq.mp4", 4)[0]
    assert frame[:, :44].min() >= 235 and frame[:, 52:].max() <= 2


# ---- matrices ----


def test_ycgco(tmp_path):
    r, g, b = PALETTE.T
    y, cg, co = r / 4 + g / 2 + b / 4, -r / 4 + g / 2 - b / 4, r / 2 - b / 2  # H.273
    for codec, suffix in (("ffv1", "mkv"), ("libx264", "mp4")):
        path = encode_planes(tmp_path / f"x.{suffix}", planes(y, cg, co), "yuv444p", codec, matrix=8)
        assert np.abs(squares(read_video(path, 2)[1]) - 255 * PALETTE).max() <= 3
    assert read_video(FILES / "cs_ycgco.mp4", 16).shape == (16, 64, 96, 3)


def test_constant_luminance(tmp_path):
    light = PALETTE
    r, _, b = curve_709(light).T
    y = curve_709(light @ [0.2627, 0.6780, 0.0593])
    cb, cr = b - y, r - y  # BT.2020-2, table 4
    cb, cr = cb / np.where(cb <= 0, 1.9404, 1.5816), cr / np.where(cr <= 0, 1.7184, 0.9938)
    path = encode_planes(tmp_path / "x.mkv", planes(y, cb, cr, 16), "yuv444p16le", "ffv1", matrix=10)
    assert np.abs(squares(read_video(path, 2)[1]) - 255 * curve_709(light)).max() <= 3


def test_colours_that_are_not_known_are_named(tmp_path):
    zero = np.zeros(8)
    for matrix, curve in ((14, 1), (11, 1), (8, 16), (10, 18)):
        path = encode_planes(
            tmp_path / "x.mkv", planes(PALETTE[:, 0], zero, zero), "yuv444p", "ffv1", matrix=matrix, curve=curve
        )
        with pytest.raises(VideoError, match=f"colour matrix that is not known .H.273 number {matrix}") as caught:
            read_video(path, 2)
        assert caught.value.kind == "in colours that are not read" and "\n" not in str(caught.value)
    with av.open(str(path)) as container, pytest.raises(ColourError):
        to_rgb(next(container.decode(video=0)))


@pytest.mark.parametrize("curve", [8, 9, 10, 17])
def test_curves_that_are_not_made_for_a_screen_are_named(tmp_path, curve):
    """Linear light, log and the cinema's: read as they are they would be too dark or too pale."""
    zero = np.zeros(8)
    path = encode_planes(tmp_path / "x.mkv", planes(PALETTE[:, 0], zero, zero), "yuv444p", "ffv1", curve=curve)
    with pytest.raises(VideoError, match=f"found a transfer curve of no screen, .*number {curve}.; convert it") as caught:
        read_video(path, 2)
    assert caught.value.kind == "in colours that are not read" and "\n" not in str(caught.value)


@pytest.mark.parametrize("curve", [2, 4, 5, 6, 7, 11, 13, 14, 15])
def test_curves_of_ordinary_screens_are_read_alike(tmp_path, curve):
    zero = np.zeros(8)
    for number in (1, curve):
        encode_planes(tmp_path / f"{number}.mkv", planes(PALETTE[:, 0], zero, zero), "yuv444p", "ffv1", curve=number)
    assert np.array_equal(read_video(tmp_path / "1.mkv", 2), read_video(tmp_path / f"{curve}.mkv", 2))


def test_ordinary_frames_are_what_the_codec_library_makes_of_them(tmp_path):
    zero = np.zeros(8)
    path = encode_planes(tmp_path / "x.mkv", planes(PALETTE[:, 0], zero, zero), "yuv444p", "ffv1", matrix=1, curve=1)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert np.array_equal(to_rgb(frame), frame.to_ndarray(format="rgb24"))
