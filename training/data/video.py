"""Video files in and out, as uint8 arrays of RGB frames."""

import os
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from training.run.packages import needs

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


class VideoError(ValueError):
    """A video that cannot be read or written; the message is one sentence that names the file."""


def codec() -> ModuleType:
    """PyAV. MissingPackageError where it is not installed: to be told so before hours of work end in a video."""
    return needs("av", "to read and write videos")


def write_video(path, frames: np.ndarray, fps: int, crf: int = 12) -> None:
    """Writes frames (F, H, W, 3) uint8 RGB as H.264 (yuv420p) at `fps` frames a second; the same frames give the same bytes.

    The container follows the suffix of `path`. `crf` is x264's quality: 0 is lossless but for the colour conversion, 51 the
    worst. The file appears whole or not at all. VideoError for frames of another kind, odd sides (yuv420p stores one colour
    for 2 x 2 pixels), a suffix whose container takes no H.264, no such folder, no right to write or no room.
    """
    path, frames = Path(path), np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise VideoError(
            f"Expected uint8 frames of shape (F, H, W, 3) for {path}, found {frames.dtype} {frames.shape}; convert them first."
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"Expected even sides for {path}, found {height} x {width}; crop or pad the frames by one pixel.")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        _encode(temporary, frames, fps, crf)
        os.replace(temporary, path)
    except OSError as error:
        raise VideoError(
            f"Expected room and the right to write {path}, found: {error.strerror}; name another place or make room."
        ) from error
    except ValueError as error:  # what FFmpeg has against the container
        raise VideoError(f"Expected a suffix that takes H.264, such as .mp4, found {path} ({error}); rename it.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _encode(path: Path, frames: np.ndarray, fps: int, crf: int) -> None:
    av, height, width = codec(), *frames.shape[1:3]
    kinds = av.video.reformatter
    mpeg_range, bt601 = int(kinds.ColorRange.MPEG), int(kinds.Colorspace.ITU601)
    with av.open(f"file:{path}", "w") as container:
        # One thread: x264's output depends on the number of threads.
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # The matrix is written down, or a player guesses it from the size of the picture.
        stream.codec_context.color_range, stream.codec_context.colorspace = mpeg_range, bt601
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=bt601)))
        container.mux(stream.encode())


def read_video(path, frames: int, stride: int = 1, start: int = 0, data: bytes | None = None) -> np.ndarray:
    """Frames start, start + stride, … of a video's first picture stream, as (frames, H, W, 3) uint8 RGB, upright.

    With `data`, the bytes of a video that is part of another file, `path` is only its name. VideoError for a video that is
    missing, empty, none, damaged within the frames asked for, or too short for them.
    """
    av, path = codec(), Path(path)
    if data is None and not path.is_file():
        raise VideoError(f"Expected a video file at {path}, found {'a folder' if path.is_dir() else 'nothing'}.")
    if (path.stat().st_size if data is None else len(data)) == 0:
        raise VideoError(f"Expected a video in {path}, found an empty file; copy or export it again.")
    wanted = range(start, start + frames * stride, stride)
    kept, decoded = [], 0
    try:
        # Local files only: a playlist in disguise must not make FFmpeg open the network.
        source = f"file:{path.resolve()}" if data is None else BytesIO(data)
        with av.open(source, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise VideoError(f"Expected a video in {path}, found no picture stream (sound only?).")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # callers read several files at once
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise VideoError(
                        f"Expected a whole video in {path}, found frame {decoded} damaged; copy or export it again."
                    )
                if decoded in wanted:
                    kept.append(_upright_rgb(frame))
                decoded += 1
                if len(kept) == frames:
                    break
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"Expected a readable video in {path}, found it truncated, damaged or of another kind ({error.strerror or error} "
            f"after {decoded} frames); copy or export it again."
        ) from error
    if len(kept) < frames:
        raise VideoError(
            f"Expected at least {wanted[-1] + 1} frames in {path} ({frames} frames, stride {stride}, from frame {start}), "
            f"found {decoded}; ask for fewer or leave the file out."
        )
    if len({frame.shape for frame in kept}) > 1:
        raise VideoError(f"Expected frames of one size in {path}, found several; export it again at one size.")
    return np.stack(kept)


def _upright_rgb(frame: "av.VideoFrame") -> np.ndarray:
    """(H, W, 3) uint8, with the matrix that the file declares and turned as its display matrix says."""
    rgb = frame.to_ndarray(format="rgb24")
    return np.rot90(rgb, round(frame.rotation / 90)) if frame.rotation else rgb
