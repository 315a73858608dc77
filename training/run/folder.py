"""The folder of one run, held by one process at a time: its settings, its statistics and whatever else is put there."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from avdm2_nodes.files.sentences import one_line, reason
from training.run.config import DistillConfig, to_yaml, training_changes
from training.run.reading import UnreadableError, parsed, read_json, read_text

_LONGEST = 4000  # characters of a sentence; many settings may have changed
_SPARE_BYTES = 64 * 2**20  # for the logs, samples and reports that nobody counts


class RunFolderError(RuntimeError):
    """A run folder that cannot be used; the message is one sentence that names it."""

    def __init__(self, message: str = ""):
        super().__init__(one_line(message, _LONGEST))


class RunFolder:
    """`with RunFolder(path, expected_bytes) as folder:` makes the folder and holds it until the end of the block.

    With `hold` false it does neither: another process of the same run holds it, and this one only reads there.

    `expected_bytes` is what is going to be written there, `setting` what names the folder. The lock is the operating system's:
    it ends with its holder, however that dies. RunFolderError, on entering, when the folder cannot be made or written, its disk
    is too full or another process holds it.
    """

    def __init__(self, path, expected_bytes: int = 0, setting: str = "--run.folder", hold: bool = True):
        self.path, self.expected_bytes, self.setting, self.hold = Path(path), expected_bytes, setting, hold
        self._lock = self._stats = None

    def __enter__(self):
        if not self.hold:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+b", buffering=0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()).encode())
            free, needed = shutil.disk_usage(self.path).free, self.expected_bytes + _SPARE_BYTES
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().decode() or "unknown"
            self._close()
            raise RunFolderError(
                f"Expected a folder that is free at {self.path}, found it in use by process {holder}; "
                f"wait for that, or name another with {self.setting}."
            ) from error
        except OSError as error:
            self._close()
            raise RunFolderError(
                f"Expected a folder that can be written at {self.path}, found: {error.strerror}; "
                f"name another with {self.setting}."
            ) from error
        if free < needed:
            self._close()
            raise RunFolderError(
                f"Expected {needed / 2**20:.0f} MiB free for {self.path}, found {free / 2**20:.0f} MiB; "
                f"make room, or name another disk with {self.setting}."
            )
        return self

    def __exit__(self, *_):
        self._close()

    def start(self, config: DistillConfig, update: int = 0) -> None:
        """Takes up the run after `update` (0: from the beginning): writes config.yaml, cuts stats.jsonl back to that update.

        Resuming, RunFolderError when a setting that bears on training differs from config.yaml's, and nothing is changed.
        """
        settings, stats = self.path / "config.yaml", self.path / "stats.jsonl"
        if update > 0:
            self._compare(settings, config)
        with told_of_disk(self.path):
            kept = [line for line in _lines(stats) if _update_of(line) <= update] if update > 0 else []
            _replace(stats, "".join(kept))
            _replace(settings, to_yaml(config))
            self._stats = stats.open("a", encoding="utf-8", buffering=1)

    def hold_to(self, clips: dict[str, str | int], resumes: bool) -> None:
        """Writes down what tells the run's clips apart; where it resumes, RunFolderError for others than those it was begun with.

        A folder that says nothing of them, of before or because somebody removed the file, takes those that are there.
        """
        path = self.path / "clips.json"
        if resumes and path.exists():
            try:
                found = read_json(path)
            except UnreadableError as error:
                raise RunFolderError(f"Expected what this run's clips are in {path}, found: {error}; remove it.") from error
            if found != clips:
                was = found.get("clips") if isinstance(found, dict) else None
                raise RunFolderError(
                    f"Expected the clips that the run in {self.path} was begun with ({was}), found others ({clips['clips']}), "
                    f"in number, order, captions or pictures; put them back, or remove {path.name} from there to go on with these."
                )
        with told_of_disk(self.path):
            _replace(path, json.dumps(clips, indent=1))

    def write_stats(self, update: int, values: dict) -> None:
        """Appends one line {"update": …, **values} to stats.jsonl, once `start` was called; NaN and Inf are written as null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with told_of_disk(self.path):
            self._stats.write(json.dumps({"update": update, **finite}, allow_nan=False) + "\n")

    def _compare(self, settings: Path, config: DistillConfig) -> None:
        try:
            earlier = read_text(settings)
        except UnreadableError as error:
            raise RunFolderError(
                f"Expected the settings of the run to resume in {settings}, found: {error}; "
                "put them back, or name another folder with --run.folder."
            ) from error
        if changes := training_changes(earlier, config):
            raise RunFolderError(
                f"Expected the settings of {settings} for resuming its run, found {'; '.join(changes)}; "
                "set them back, or name another folder with --run.folder."
            )

    def _close(self) -> None:
        for file in (self._stats, self._lock):
            if file:
                file.close()
        self._stats = self._lock = None


def require_writable(folder: Path, setting: str = "--out") -> None:
    """RunFolderError where no file could be written into a folder, one that is yet to be made too: to be told so before hours of work.

    Nothing is made or left there.
    """
    folder = Path(folder).absolute()
    try:
        place = folder
        while not _lies(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:  # ValueError: of a name that no file can have
        raise RunFolderError(
            f"Expected a folder that can be written at {folder}, found: {reason(error)}; name another with {setting}."
        ) from error


def _lies(path: Path) -> bool:
    """Whether anything is there, a link to nothing too. OSError, ValueError for a name that no file can have."""
    try:
        os.lstat(path)
        return True
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def told_of_disk(path: Path) -> Iterator[None]:
    """What the operating system has against a file of the folder, as RunFolderError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise RunFolderError(
            f"Expected room and the right to write into {path}, found: {reason(error)}; "
            "clear the way and give the command again: it goes on."
        ) from error


def _lines(path: Path) -> list[str]:
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would wait for ever
        raise RunFolderError(f"Expected the statistics of the run in {path}, found neither a file nor a folder; take it away.")
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []


def _update_of(line: str) -> float:
    """The update that a line of stats.jsonl is about; infinite for a line that was cut short."""
    try:
        update = parsed(line)["update"] if line.endswith("\n") else math.inf
        return update if isinstance(update, int) else math.inf
    except (UnreadableError, KeyError, TypeError):
        return math.inf


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
