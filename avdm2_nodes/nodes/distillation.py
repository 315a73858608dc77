from comfy_api.latest import io

from ..comfy_bridge import folders
from .category import CATEGORY, motion_module_input


class Distillation(io.ComfyNode):
    """A student, distilled from a teacher in a process of its own."""

    @classmethod
    def define_schema(cls):
        folders.register_folders()
        return io.Schema(
            node_id="AVDM2Distillation",
            display_name="AVDM2 Distillation",
            category=CATEGORY,
            description="Distils a teacher into a student that makes a clip in 4 evaluations: an SD1.5 model with a motion module learns "
            "from videos with captions, or from clips that it makes itself. Takes minutes for the miniature and a day for SD1.5, in a "
            "process of its own: ComfyUI's models are unloaded first, an interrupt stops it, and the same inputs go on from there. The "
            "student is a file in models/avdm2.",
            inputs=[
                io.Model.Input(
                    "teacher",
                    tooltip="From AVDM2 Teacher Loader or AVDM2 Motion Module, without LoRAs: training reads its files.",
                ),
                io.Combo.Input(
                    "videos",
                    options=folders.video_sources(),
                    tooltip="A folder in ComfyUI's input folder with videos and their captions (a .txt beside each, or a captions.csv). "
                    "For the miniature, clips are rendered. Without videos the teacher makes clips of the prompts first.",
                ),
                io.String.Input(
                    "name",
                    default="my student",
                    tooltip="The name of the student's file in models/avdm2 and of its folder in output/AVDM2; it may have subfolders.",
                ),
                io.Int.Input(
                    "updates",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="How long it learns, the warm-up included; 0 takes as many as the settings say. More than before goes on "
                    "from there.",
                ),
                io.Combo.Input(
                    "settings",
                    options=list(folders.SETTINGS),
                    tooltip="What is trained: adapters and motion, which fits a card of 24 GB, or all weights, which needs 80 GB. The "
                    "miniature has settings of its own, whatever is chosen here.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Only without videos: what the teacher makes clips of, one a line, 50 or more. The miniature has its own.",
                ),
                motion_module_input(),
            ],
            outputs=[io.Model.Output(display_name="student")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, teacher, videos, name, updates, settings, prompts="", motion_module=folders.AS_WIRED) -> io.NodeOutput:
        from ..comfy_bridge.distillation import distil_student
        from ..comfy_bridge.progress import show_trained

        trained = distil_student(teacher, videos, name, updates, settings, prompts, motion_module)
        return io.NodeOutput(trained.student, ui=show_trained(trained))
