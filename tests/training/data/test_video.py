import itertools
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.training.data.conftest import FILES
from training.data.video import VideoError, decode_video, oriented, read_video, require_video_place, write_video
from training.world.scenes import all_contents, render, render_split

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def clip():
    """Sixteen frames, so that there is a rest after any cut."""
    rng = np.random.default_rng(0)
    return np.concatenate([render(content, "plain", rng).frames for content in all_contents()[:2]])


@pytest.fixture
def video(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    write_video(path, clip, 8)
    return path


def encode(path, frames, codec="libx264", fmt="yuv420p", rate=8, **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, options={"x265-params": "log-level=none"} if codec == "libx265" else {})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], fmt
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def test_round_trip_keeps_the_picture(video, clip):
    read = read_video(video, 16)
    assert read.shape == clip.shape and read.dtype == np.uint8
    error = read.astype(float) - clip
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 30
    assert abs(error.mean()) < 1


@pytest.mark.parametrize("colour", [(230, 36, 36), (36, 194, 46), (46, 71, 240), (255, 255, 255), (0, 0, 0)])
def test_colours_survive(tmp_path, colour):
    write_video(tmp_path / "c.mp4", np.full((3, 32, 48, 3), colour, np.uint8), 8)
    assert np.abs(read_video(tmp_path / "c.mp4", 3).astype(int) - colour).max() <= 3


def test_same_frames_same_bytes_and_rate(tmp_path, video, clip):
    write_video(tmp_path / "again.mp4", clip, 8)
    assert (tmp_path / "again.mp4").read_bytes() == video.read_bytes()
    with av.open(str(video)) as container:
        assert container.streams.video[0].average_rate == 8


def test_rendered_clips_are_written_to_the_same_bytes_every_time(tmp_path):
    """x264's macroblock tree makes of some frames other files from one writing to the next; these clips are such."""
    frames = [clip.frames for clip in render_split(28, style="plain", held_out=False, seed=0)]
    seen = {}
    for turn in range(8):
        for number in (13, 18, 25, 27):
            path = tmp_path / f"{number}.{turn % 3}.mp4"
            write_video(path, frames[number], 8)
            seen.setdefault(number, set()).add(path.read_bytes())
    assert all(len(files) == 1 for files in seen.values())
    assert all(b"mbtree=0" in file for files in seen.values() for file in files)  # as x264 itself writes down


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".avi"])
def test_other_containers(tmp_path, clip, suffix):
    write_video(tmp_path / f"clip{suffix}", clip[:8], 8)
    assert read_video(tmp_path / f"clip{suffix}", 8).shape == (8, 64, 64, 3)


def test_start_and_stride_pick_frames(video):
    everything = read_video(video, 16)
    assert np.array_equal(read_video(video, 4, stride=3, start=2), everything[2:12:3])


def test_crf_trades_size_for_quality(tmp_path, video, clip):
    write_video(tmp_path / "small.mp4", clip, 8, crf=40)
    assert (tmp_path / "small.mp4").stat().st_size < video.stat().st_size * 0.8


@pytest.mark.parametrize(
    ("frames", "word"),
    [
        (np.zeros((2, 64, 64, 3), np.float32), "float32"),
        (np.zeros((2, 3, 64, 64), np.uint8), "shape"),
        (np.zeros((0, 64, 64, 3), np.uint8), "shape"),
        (np.zeros((2, 63, 64, 3), np.uint8), "63 x 64"),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames, word):
    with pytest.raises(VideoError, match=word):
        write_video(tmp_path / "clip.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["clip.webm", "clip.xyz"])
def test_a_suffix_without_a_container_is_refused(tmp_path, clip, name):
    with pytest.raises(VideoError, match=name):
        write_video(tmp_path / name, clip, 8)
    assert not list(tmp_path.iterdir())


def test_no_half_file_when_writing_fails(tmp_path, video, clip, monkeypatch):
    before = video.read_bytes()
    monkeypatch.setattr(
        "training.data.video.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(VideoError, match=r"clip\.mp4, found: No space left on device;"):
        write_video(video, clip[::-1], 8)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"] and video.read_bytes() == before


def test_no_room_while_encoding(tmp_path):
    """A limit on the size of files stands for a full disk."""
    script = """
import resource, sys
import numpy as np
from training.data.video import VideoError, write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
try:
    write_video(sys.argv[1], noise, 8)
except VideoError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "clip.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.startswith(f"Expected room and the right to write {tmp_path / 'clip.mp4'}, found: "), done
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_refused(tmp_path, clip):
    with pytest.raises(VideoError, match=r"no-folder/clip\.mp4, found: No such file"):
        write_video(tmp_path / "no-folder" / "clip.mp4", clip, 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-folder/clip.mp4", "found: No such file"),
        ("folder", "found a folder"),
        ("clip.xyz", "a suffix that takes H.264"),
        ("c" * 252 + ".mp4", "found: File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_beforehand(tmp_path, video, name, said):
    (tmp_path / "folder").mkdir()
    before = video.read_bytes()
    with pytest.raises(VideoError, match=said):
        require_video_place(tmp_path / name)
    require_video_place(video)
    require_video_place(tmp_path / "new.mkv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "folder"] and video.read_bytes() == before


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4, found nothing"):
        read_video(tmp_path / "gone.mp4", 8)
    with pytest.raises(VideoError, match="found a folder"):
        read_video(tmp_path, 8)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
SUBTITLES = b"1\n00:00:01,000 --> 00:00:02,000\nhello\n\n" * 20


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world\n" * 500, bytes(5000), np.random.default_rng(0).bytes(5000), PLAYLIST, SUBTITLES],
    ids=["empty", "text", "zeros", "noise", "playlist", "subtitles"],
)
def test_files_that_are_no_video(tmp_path, content):
    (tmp_path / "fake.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=r"fake\.mp4") as caught:
        read_video(tmp_path / "fake.mp4", 8)
    assert "\n" not in str(caught.value)


DASH = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S"
 profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">
<Period><AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="9" width="64" height="64">
<BaseURL>clip.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>
"""
SCRIPTS = {
    "concat": "ffconcat version 1.0\nfile clip.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nclip.mp4\n#EXT-X-ENDLIST\n",
    "dash": DASH,
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_does_not_reach_another_video(tmp_path, video, kind):
    (tmp_path / "list.mp4").write_text(SCRIPTS[kind])
    for data in (None, SCRIPTS[kind].encode()):
        with pytest.raises(VideoError, match=r"list\.mp4, found .*another kind"):
            read_video(tmp_path / "list.mp4", 8, data=data)


@pytest.mark.parametrize(
    ("kind", "codec"),
    [("mpegts", "libx264"), ("flv", "libx264"), ("nut", "libx264"), ("asf", "mpeg4"), ("ogg", "libtheora"), ("mpeg", "mpeg2video"),
     ("ivf", "libvpx-vp9"), ("matroska", "ffv1")],
)  # fmt: skip
def test_containers_under_another_suffix(tmp_path, clip, kind, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    with av.open(str(tmp_path / "clip.mp4"), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for array in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    assert read_video(tmp_path / "clip.mp4", 8).shape == (8, 64, 64, 3)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no picture stream"):
        read_video(tmp_path / "sound.mp4", 1)


def test_truncated_file_without_index(tmp_path, video):
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:-500])
    with pytest.raises(VideoError, match=r"cut\.mp4.*truncated"):
        read_video(tmp_path / "cut.mp4", 8)


def test_truncated_file_with_its_index_in_front(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    encode(tmp_path / "whole.mp4", noise, movflags="faststart")
    data = (tmp_path / "whole.mp4").read_bytes()
    assert read_video(tmp_path / "whole.mp4", 16).shape[0] == 16
    for part in (0.3, 0.6, 0.95):
        (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * part)])
        with pytest.raises(VideoError, match=r"cut\.mp4"):
            read_video(tmp_path / "cut.mp4", 16)


def test_a_file_of_which_no_frame_is_left_is_damaged_not_short(tmp_path, clip):
    encode(tmp_path / "whole.mkv", clip, codec="ffv1")
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(
        data[: data.index(b"\x1f\x43\xb6\x75") + 40]
    )  # Matroska's first cluster, without its frames
    with pytest.raises(VideoError, match=r"cut\.mkv.*copy or export it again") as caught:
        read_video(tmp_path / "cut.mkv", 1)
    assert caught.value.kind == "damaged"


@pytest.mark.parametrize(
    ("name", "codec", "fmt"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mov", "mjpeg", "yuvj444p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.avi", "rawvideo", "bgr24"),
        ("a.avi", "huffyuv", "yuv422p"),
        ("a.avi", "wmv2", "yuv420p"),
        ("a.mkv", "ffv1", "gbrp16le"),
        ("a.mkv", "ffv1", "bgr0"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mkv", "libx264", "yuv422p10le"),
        ("a.mp4", "libx264", "yuv444p"),
        ("a.mp4", "libx265", "yuv420p10le"),
        ("a.mkv", "libsvtav1", "yuv420p10le"),
    ],
)
def test_other_codecs_and_depths(tmp_path, name, codec, fmt):
    """Red over grey, grey over blue: every codec that the library brings, alike up to its loss."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    want = np.full((4, 64, 96, 3), 128, np.uint8)
    want[:, :32, :48], want[:, 32:, 48:] = (253, 0, 0), (0, 0, 254)
    encode(tmp_path / name, want, codec=codec, fmt=fmt, rate=25)
    got = read_video(tmp_path / name, 4)
    for y in (16, 48):
        for x in (24, 72):
            assert np.abs(got[:, y, x].astype(int) - want[:, y, x]).max() < 8


def test_too_short(video):
    with pytest.raises(VideoError, match=r"at least 17 frames.*found 16"):
        read_video(video, 17)
    with pytest.raises(VideoError, match=r"at least 22 frames.*stride 3"):
        read_video(video, 8, stride=3)


def test_a_file_is_what_it_decodes_to_whatever_its_header_says(tmp_path, video, clip):
    data, want = video.read_bytes(), read_video(video, 16)
    entry = data.index(b"avc1", data.index(b"stsd")) + 28  # width and height of the sample entry (ISO/IEC 14496-12, 12.1.3)
    length = data.index(b"mdhd") + 20  # of the track, in its time scale (likewise, 8.4.2)
    for place, lie in ((entry, struct.pack(">HH", 640, 16)), (length, struct.pack(">I", 10**6))):
        (tmp_path / "lies.mp4").write_bytes(data[:place] + lie + data[place + 4 :])
        assert np.array_equal(read_video(tmp_path / "lies.mp4", 16), want)
        with pytest.raises(VideoError, match=r"at least 17 frames.*found 16"):
            read_video(tmp_path / "lies.mp4", 17)


def test_a_picture_that_changes_its_size_is_refused(tmp_path, clip):
    """Two streams of H.264 one after another, as a broken recorder leaves them: each begins with a header of its own."""
    for name, frames in (("a", clip[:4]), ("b", clip[:4, :32])):
        encode(tmp_path / f"{name}.h264", frames)
    (tmp_path / "both.h264").write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    assert read_video(tmp_path / "both.h264", 4).shape == (4, 64, 64, 3)
    with pytest.raises(VideoError, match="found several; export it again"):
        read_video(tmp_path / "both.h264", 8)


def test_the_colour_matrix_of_the_file_is_heeded(tmp_path):
    green = np.full((2, 32, 32, 3), (20, 200, 60), np.uint8)
    with av.open(str(tmp_path / "hd.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width = stream.height = 32
        stream.pix_fmt, stream.codec_context.colorspace = "yuv420p", 1  # BT.709
        for array in green:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p", dst_colorspace=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.abs(read_video(tmp_path / "hd.mp4", 2).astype(int) - green).max() <= 4


def test_a_turned_video_is_read_upright(tmp_path, video):
    """Phones store the picture as the sensor lies and say in a matrix how to turn it."""
    data, upright = video.read_bytes(), read_video(video, 1)[0]
    plain = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    clockwise = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    track = data.index(plain, data.index(b"tkhd"))
    (tmp_path / "turned.mp4").write_bytes(data[:track] + clockwise + data[track + len(plain) :])
    assert np.array_equal(read_video(tmp_path / "turned.mp4", 1)[0], np.rot90(upright, -1))


# ---- as a player shows it ----


PLAIN = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()


def with_matrix(data, a, b, c, d):
    """The bytes of an MP4 with another display matrix of its track."""
    track = data.index(PLAIN, data.index(b"tkhd"))
    matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return data[:track] + matrix + data[track + len(PLAIN) :]


EIGHT = [(a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)] + [
    (0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2)
]


@pytest.mark.parametrize("matrix", EIGHT)
def test_all_eight_orientations(tmp_path, matrix):
    """Against the matrix's own definition, pixel by pixel: (x, y) goes to (a x + c y, b x + d y), moved into view."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames, 8)
    stored = read_video(tmp_path / "clip.mp4", 1)[0]
    a, b, c, d = matrix
    x, y = np.meshgrid(np.arange(48), np.arange(32))
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    expected = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    expected[to_y, to_x] = stored
    (tmp_path / "turned.mp4").write_bytes(with_matrix((tmp_path / "clip.mp4").read_bytes(), *matrix))
    assert np.array_equal(read_video(tmp_path / "turned.mp4", 1)[0], expected)


def test_mirrored_left_to_right_and_upside_down():
    picture = np.arange(24).reshape(2, 4, 3)
    assert np.array_equal(oriented(picture, np.array([-1, 0, 0, 0, 1, 0, 9, 9, 1])), picture[:, ::-1])
    assert np.array_equal(oriented(picture, np.array([1, 0, 0, 0, -1, 0, 9, 9, 1])), picture[::-1])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("tag", [b"caf\xe9", b"\xff\xfe\xfd", b"\x83\x65\x83\x58"])
def test_tags_in_other_encodings_do_not_matter(tmp_path, clip, suffix, tag):
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "A" * len(tag)
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for array in clip[:4]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    want, data = read_video(path, 4), path.read_bytes()
    assert data.count(b"A" * len(tag)) == 1
    path.write_bytes(data.replace(b"A" * len(tag), tag))
    assert np.array_equal(read_video(path, 4), want)


@pytest.mark.parametrize(
    ("aspect", "size"),
    [((2, 1), (64, 128)), ((1, 2), (128, 64)), ((16, 15), (64, 68)), ((1, 1), (64, 64)), ((4095, 4096), (64, 64))],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_that_are_not_square(tmp_path, clip, suffix, aspect, size):
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        for array in clip[:4]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    read = read_video(path, 2)
    assert read.shape == (2, *size, 3)
    assert abs(read.mean() - clip[:2].mean()) < 3


def test_pixels_of_no_sense_are_taken_as_square(tmp_path, clip):
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(200, 1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clip[0], format="rgb24")))
        container.mux(stream.encode())
    assert read_video(tmp_path / "x.mp4", 1).shape == (1, 64, 64, 3)


def test_the_stream_that_moves_is_read_not_the_cover_before_it():
    assert read_video(FILES / "cover_first.mp4", 16).shape == (16, 64, 96, 3)


def test_a_stream_of_one_frame_before_the_video_is_passed_over(tmp_path, clip):
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        still, moving = (container.add_stream("libx264", rate=8) for _ in range(2))
        for stream, side in ((still, 32), (moving, 64)):
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
        for stream, frames in ((still, clip[:1, :32, :32]), (moving, clip)):
            for array in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    assert read_video(tmp_path / "x.mp4", 8).shape == (8, 64, 64, 3)


# ---- by time ----


def timed(path, times, base=Fraction(1, 1000), rate=None):
    """A lossless video whose frame i is grey of 10 i, shown from times[i] seconds on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate or 30)
        stream.width = stream.height = 16
        stream.pix_fmt, stream.codec_context.time_base = "gray", base
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), 10 * i, np.uint8), format="gray")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(frames):
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize(("rate", "fps", "want"), [
    (24, 8, [0, 3, 6, 9, 12, 15]),
    (24, 12, [0, 2, 4, 6, 8, 10]),
    (24, 24, [0, 1, 2, 3, 4, 5]),
    (30, 8, [0, 4, 7, 11, 15, 19]),  # nearest to 3.75, 7.5 (the earlier), 11.25, 15, 18.75
    (8, 16, [0, 0, 1, 1, 2, 2]),
    (Fraction(30000, 1001), 10, [0, 3, 6, 9, 12, 15]),
])  # fmt: skip
@pytest.mark.parametrize("start", [0.0, 5.0])
def test_frames_are_chosen_by_time(tmp_path, rate, fps, want, start):
    path = timed(tmp_path / "x.mkv", [start + i / rate for i in range(24)], rate=Fraction(rate))
    assert shown(read_video(path, 6, fps=fps)) == want
    assert shown(read_video(path, 2, stride=2, start=1, fps=fps)) == [want[1], want[3]]


def test_a_video_of_changing_rate(tmp_path):
    path = timed(tmp_path / "x.mkv", [0, 0.1, 0.2, 0.3, 0.8, 1.0, 1.9])
    assert shown(read_video(path, 10, fps=10)) == [0, 1, 2, 3, 3, 3, 4, 4, 4, 4]  # 0.5 s is nearer to 0.3 than to 0.8


def test_a_video_that_is_too_short_in_seconds(tmp_path):
    path = timed(tmp_path / "x.mkv", [i / 24 for i in range(24)], rate=24)
    assert len(read_video(path, 8, fps=8)) == 8  # one second
    with pytest.raises(VideoError, match=r"at least 9 frames at 8 frames a second.*found 24 at 24") as caught:
        read_video(path, 9, fps=8)
    assert caught.value.kind == "too short"


def test_the_rate_is_told(video):
    assert decode_video(video, 1).rate == 8.0
