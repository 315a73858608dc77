from comfy_api.latest import io

from ..comfy_bridge import folders
from .category import CATEGORY, clips_input


class StudentLoader(io.ComfyNode):
    """A student on an SD1.5 MODEL."""

    @classmethod
    def define_schema(cls):
        folders.register_folders()
        return io.Schema(
            node_id="AVDM2StudentLoader",
            display_name="AVDM2 Student Loader",
            category=CATEGORY,
            description="Puts a student into an SD1.5 model: motion, and weights that make a clip in 4 evaluations "
            "instead of 50. Sample it with "
            "AVDM2 Student Sampler, or with KSampler: sampler lcm, scheduler simple, 4 steps, cfg 1. LoRAs, ControlNets, IP-Adapters and "
            "masks work as with images.",
            inputs=[
                io.Combo.Input(
                    "student",
                    options=folders.student_choices(),
                    tooltip="A student file from models/avdm2, the one that comes with this pack (for the miniature), or an "
                    "AnimateDiff-Lightning or AnimateLCM module from models/animatediff_models.",
                ),
                io.Model.Input(
                    "teacher",
                    display_name="model",
                    tooltip="The student's base: an SD1.5 model from Load Checkpoint, with its LoRAs, or a teacher. On another "
                    "base than its own the student takes on that one's look; the node says so.",
                ),
                clips_input(),
            ],
            outputs=[io.Model.Output(display_name="student")],
        )

    @classmethod
    def execute(cls, student, teacher, clips=1) -> io.NodeOutput:
        from ..comfy_bridge.models import load_student

        return io.NodeOutput(load_student(student, teacher, clips))
