from comfy_api.latest import io

from ..comfy_bridge import folders
from .types import CATEGORY, StudentWire, TeacherWire


class StudentLoader(io.ComfyNode):
    """A student file, as patches on its teacher."""

    @classmethod
    def define_schema(cls):
        folders.register_folders()
        return io.Schema(
            node_id="AVDM2StudentLoader",
            display_name="AVDM2 Student Loader",
            category=CATEGORY,
            description="Loads a student: weights that let its teacher's network make a clip in 4 evaluations instead of 50. Teacher "
            "and student share their memory.",
            inputs=[
                io.Combo.Input(
                    "student",
                    options=folders.student_choices(),
                    tooltip="A student file from models/avdm2, the one that comes with this pack, or an AnimateDiff-Lightning or "
                    "AnimateLCM module from models/animatediff_models.",
                ),
                TeacherWire.Input(
                    "teacher",
                    tooltip="The teacher that the student was made from; for Lightning and AnimateLCM, any SD1.5 teacher.",
                ),
            ],
            outputs=[StudentWire.Output(display_name="student")],
        )

    @classmethod
    def execute(cls, student, teacher) -> io.NodeOutput:
        from ..comfy_bridge.models import load_student

        return io.NodeOutput(load_student(student, teacher))
