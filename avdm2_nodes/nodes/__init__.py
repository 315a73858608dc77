"""The nodes, one thin file each."""

from .distillation import Distillation
from .motion_module import MotionModule
from .prompt_travel import PromptTravel
from .save_student import SaveStudent
from .sparse_control_loader import SparseControlLoader
from .stack_loader import StackLoader
from .steps import Steps
from .student_loader import StudentLoader
from .student_sampler import StudentSampler
from .style_training import StyleTraining
from .style_transfer import StyleTransfer
from .teacher_loader import TeacherLoader
from .teacher_sampler import TeacherSampler

NODES = [
    StackLoader, TeacherLoader, MotionModule, StudentLoader, StudentSampler, TeacherSampler, Steps, PromptTravel, SparseControlLoader,
    StyleTransfer, StyleTraining, Distillation, SaveStudent,
]  # fmt: skip
