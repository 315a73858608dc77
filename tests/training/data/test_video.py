import os
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from training.data.video import VideoError, read_video, write_video
from training.world.scenes import all_contents, render

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


def encode(path, frames, **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
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
