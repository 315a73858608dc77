"""Video files in and out, as uint8 arrays of RGB frames."""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from avdm2_nodes.files.paths import is_folder
from training.data.colours import ColourError, to_rgb
from training.data.sizes import resized
from training.data.unusable import COLOURS, DAMAGED, MISSING, SHORT
from training.run.packages import needs

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")

# Containers and streams that hold their own pictures. All else that FFmpeg would open is left shut: playlists and scripts name other
# files.
_CONTAINERS = ("mov", "matroska", "avi", "asf", "flv", "gif", "ivf", "mpeg", "mpegts", "mxf", "nut", "ogg", "rm",
               "dv", "h264", "hevc", "m4v", "mjpeg", "mpegvideo", "obu")  # fmt: skip
_WIDEST = 8  # pixels so many times as wide as high, or as high as wide
_TICK = 1e-4  # seconds: containers round their times


class VideoError(ValueError):
    """A video that cannot be read or written; the message is one sentence that names the file, `kind` what it is counted under."""

    def __init__(self, message: str, kind: str = DAMAGED):
        super().__init__(message)
        self.kind = kind


def codec() -> ModuleType:
    """PyAV. MissingPackageError where it is not installed: to be told so before hours of work end in a video."""
    return needs("av", "to read and write videos")


def write_video(path, frames: np.ndarray, fps: int, crf: int = 12) -> None:
    """Writes frames (F, H, W, 3) uint8 RGB as H.264 (yuv420p) at `fps` frames a second; the same frames give the same bytes.

    The container follows the suffix of `path`. `crf` is x264's quality: 0 is lossless but for the colour conversion, 51 the
    worst. The file appears whole or not at all. VideoError for frames of another kind, odd sides (yuv420p stores one colour
    for 2 x 2 pixels), a suffix whose container takes no H.264, no such folder, no right to write or no room.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise VideoError(
            f"Expected uint8 frames of shape (F, H, W, 3) for {path}, found {frames.dtype} {frames.shape}; convert them first."
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"Expected even sides for {path}, found {height} x {width}; crop or pad the frames by one pixel.")
    with _written(Path(path)) as temporary:
        _encode(temporary, frames, fps, crf)
        os.replace(temporary, path)


def require_video_place(path) -> None:
    """VideoError where `write_video` could write no video at `path`: to be told so before minutes of sampling. Nothing is left there."""
    path = Path(path)
    if is_folder(path):
        raise VideoError(f"Expected a file at {path}, found a folder; give the video a name in it.")
    with _written(path) as temporary:
        _encode(temporary, np.zeros((1, 16, 16, 3), np.uint8), 8, 12)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, gone at the end of the block; VideoError for what is against writing there."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
    except OSError as error:
        raise VideoError(
            f"Expected room and the right to write {path}, found: {error.strerror}; name another place or make room."
        ) from error
    except ValueError as error:  # what FFmpeg has against the container
        raise VideoError(f"Expected a suffix that takes H.264, such as .mp4, found {path} ({error}); rename it.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _encode(path: Path, frames: np.ndarray, fps: int, crf: int) -> None:
    av, height, width = codec(), *frames.shape[1:3]
    kinds = av.video.reformatter
    mpeg_range, bt601 = int(kinds.ColorRange.MPEG), int(kinds.Colorspace.ITU601)
    with av.open(f"file:{path}", "w") as container:
        # x264's output depends on the number of threads, and its macroblock tree is not the same from one writing to the next.
        steady = {"threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf)} | steady)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # The matrix is written down, or a player guesses it from the size of the picture.
        stream.codec_context.color_range, stream.codec_context.colorspace = mpeg_range, bt601
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=bt601)))
        container.mux(stream.encode())


class Decoded(NamedTuple):
    frames: np.ndarray  # (F, H, W, 3) uint8 RGB, upright, its pixels square
    rate: float | None  # frames a second that the file has; None where it does not say


def read_video(
    path, frames: int, stride: int = 1, start: int = 0, data: bytes | None = None, fps: float | None = None
) -> np.ndarray:
    """The frames of `decode_video`, (frames, H, W, 3) uint8 RGB."""
    return decode_video(path, frames, stride, start, data, fps).frames


def decode_video(
    path, frames: int, stride: int = 1, start: int = 0, data: bytes | None = None, fps: float | None = None
) -> Decoded:
    """Frames start, start + stride, … of a video's first stream of moving pictures, as a player shows them.

    Upright and mirrored as its display matrix says, wider or higher where its pixels are not square, HDR tone-mapped. With `fps` frame
    n is the one nearest to n / fps seconds after the first, whatever the rate of the file. With `data`, the bytes of a video that is
    part of another file, `path` is only its name. VideoError, whatever the decoder raises, for a video that is missing, empty, none,
    damaged within the frames asked for, or too short for them.
    """
    av, path = codec(), Path(path)
    if data is None and not os.path.isfile(path):
        raise VideoError(f"Expected a video file at {path}, found {'a folder' if os.path.isdir(path) else 'nothing'}.", MISSING)
    if (os.path.getsize(path) if data is None else len(data)) == 0:
        raise VideoError(f"Expected a video in {path}, found an empty file; copy or export it again.")
    counter = itertools.count()
    try:
        with _opened(av, path, data) as container:
            stream = _moving(container, path)
            stream.codec_context.thread_count = 1  # callers read several files at once
            whole = _whole(container.decode(stream), counter, path)
            rate = stream.average_rate or stream.guessed_rate
            wanted = [start + i * stride for i in range(frames)]
            chosen = _by_number(whole, wanted) if fps is None else _by_time(whole, [n / fps for n in wanted], rate, path)
            aspect, kept, last = _aspect(stream), [], None
            for frame in chosen:  # a frame that is taken twice is converted once
                kept.append(kept[-1] if frame is last else _shown(frame, aspect))
                last = frame
    except VideoError:
        raise
    except ColourError as error:
        raise VideoError(
            f"Expected colours that can be converted in {path}, found {error}; convert it to BT.709.", COLOURS
        ) from error
    except (
        Exception
    ) as error:  # FFmpeg's own kinds, and what its binding makes of odd files: ValueError, UnicodeError, MemoryError, ...
        raise VideoError(
            f"Expected a readable video in {path}, found it truncated, damaged or of another kind ("
            f"{getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__} "
            f"after {next(counter)} frames); copy or export it again."
        ) from error
    decoded = next(counter)
    if not decoded:
        raise VideoError(f"Expected a video in {path}, found no frame that can be decoded; copy or export it again.")
    if len(kept) < frames:
        seconds = "" if fps is None else f" at {fps:g} frames a second"
        raise VideoError(
            f"Expected at least {wanted[-1] + 1} frames{seconds} in {path} ({frames} frames, stride {stride}, from frame {start}), "
            f"found {decoded}{'' if fps is None or not rate else f' at {float(rate):g}'}; ask for fewer or leave the file out.",
            SHORT,
        )
    if len({frame.shape for frame in kept}) > 1:
        raise VideoError(f"Expected frames of one size in {path}, found several; export it again at one size.")
    return Decoded(np.stack(kept), float(rate) if rate else None)


def _opened(av: ModuleType, path: Path, data: bytes | None) -> "av.container.InputContainer":
    """The container, which opens nothing beside itself. VideoError for a playlist, and for other kinds that are not read."""
    source = f"file:{path.resolve()}" if data is None else BytesIO(data)
    only = {"protocol_whitelist": "file", "format_whitelist": ",".join(_CONTAINERS)}
    try:
        return av.open(source, options=only, metadata_errors="replace")  # tags in other encodings do not matter
    except av.error.ArgumentError as error:
        raise VideoError(
            f"Expected a video in {path}, found a playlist, or another kind that is not read; convert it to .mp4."
        ) from error


def _moving(container: "av.container.InputContainer", path: Path) -> "av.VideoStream":
    """The first stream of moving pictures: covers and thumbnails are streams too, marked so, or of a single frame."""
    streams = container.streams.video
    if not streams:
        raise VideoError(f"Expected a video in {path}, found no picture stream (sound alone, or cut short).")
    kind = codec().stream.Disposition
    still = kind.attached_pic | kind.timed_thumbnails | kind.still_image
    moving = [stream for stream in streams if not stream.disposition & still]
    if not moving:
        raise VideoError(f"Expected moving pictures in {path}, found a cover only.")
    return next((stream for stream in moving if stream.frames != 1), moving[0])


def _whole(frames: Iterable["av.VideoFrame"], counter: Iterator[int], path: Path) -> Iterator["av.VideoFrame"]:
    """The frames, counted. VideoError at one that is damaged."""
    for frame in frames:
        if frame.is_corrupt:
            raise VideoError(f"Expected a whole video in {path}, found frame {next(counter)} damaged; copy or export it again.")
        next(counter)
        yield frame


def _by_number(frames: Iterable["av.VideoFrame"], wanted: Sequence[int]) -> Iterator["av.VideoFrame"]:
    """The frames of these numbers, ascending, as far as there are any; no more is decoded than that takes."""
    numbers = iter(wanted)
    number = next(numbers, None)
    for i, frame in enumerate(frames):
        if i == number:
            yield frame
            number = next(numbers, None)
        if number is None:
            return


def _by_time(
    frames: Iterable["av.VideoFrame"], wanted: Sequence[float], rate: Fraction | None, path: Path
) -> Iterator["av.VideoFrame"]:
    """For each of these seconds after the first frame, ascending, the frame that is nearest (the earlier of two), while the video lasts."""
    seconds = deque(wanted)
    held, shown, first, gap = None, 0.0, None, float(1 / rate) if rate else 0.0
    for i, frame in enumerate(frames):
        time = None if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)
        if time is None and not rate:
            raise VideoError(f"Expected frames with their times in {path} for data.fps, found none; leave data.fps null.")
        time = i / float(rate) if time is None else time
        first = time if first is None else first
        time = max(time - first, shown)
        while held is not None and seconds and seconds[0] <= (shown + time) / 2 + _TICK:
            seconds.popleft()
            yield held
        if not seconds:
            return
        gap = time - shown if held is not None and time > shown else gap
        held, shown = frame, time
    while held is not None and seconds and seconds[0] < shown + gap - _TICK:  # the last is shown as long as the one before
        seconds.popleft()
        yield held


def _aspect(stream: "av.VideoStream") -> Fraction:
    """Width to height of a pixel, as the container says or else the stream itself; square where what they say makes no sense."""
    said = (stream.sample_aspect_ratio, stream.codec_context.sample_aspect_ratio)
    return next((aspect for aspect in said if aspect and 1 / _WIDEST <= aspect <= _WIDEST), Fraction(1))


def _shown(frame: "av.VideoFrame", aspect: Fraction) -> np.ndarray:
    """(H, W, 3) uint8 as a player shows the frame."""
    rgb = to_rgb(frame)
    if aspect != 1:
        # The longer side grows, so that nothing is lost.
        height, width = rgb.shape[:2]
        height, width = (height, round(width * aspect)) if aspect > 1 else (round(height / aspect), width)
        rgb = resized(torch.from_numpy(np.ascontiguousarray(rgb))[None], height, width)[0].numpy()
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    return rgb if matrix is None else oriented(rgb, np.frombuffer(bytes(matrix), "=i4"))


def oriented(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(H, W, 3) turned and mirrored by a display matrix (ISO/IEC 14496-12, 8.2.2: a, b, u, c, d, v, x, y, w), to the nearest quarter turn.

    A pixel at (x, y) goes to (a x + c y, b x + d y), y downwards.
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return picture.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]
