"""The nodes, one a file, in the order in which a person meets them."""

from .save_student import SaveStudent
from .student_loader import StudentLoader
from .student_sampler import StudentSampler
from .style_training import StyleTraining
from .style_transfer import StyleTransfer
from .teacher_loader import TeacherLoader
from .teacher_sampler import TeacherSampler

NODES = [TeacherLoader, StudentLoader, StudentSampler, TeacherSampler, StyleTransfer, StyleTraining, SaveStudent]
