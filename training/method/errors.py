"""What a run may end with that is the reader's to put right: each error's message is a sentence or more, told without a traceback."""

from avdm2_nodes.diffusion.style import StyleError
from avdm2_nodes.files.stack import StackError
from avdm2_nodes.files.student_info import StudentFileError
from avdm2_nodes.files.style import StyleFileError
from training.data import DataError
from training.data.video import VideoError
from training.method.learner import DivergedError, OptimiserError
from training.run.checkpoint import CheckpointError
from training.run.config import ConfigError
from training.run.folder import RunFolderError
from training.run.packages import MissingPackageError
from training.run.parent import StoppedError
from training.run.precision import DeviceError
from training.run.processes import LostProcessError

EXPECTED_ERRORS = (
    CheckpointError, ConfigError, DataError, DeviceError, DivergedError, LostProcessError, MissingPackageError, OptimiserError,
    RunFolderError, StackError, StoppedError, StudentFileError, StyleError, StyleFileError, VideoError,
)  # fmt: skip
