from comfy_api.latest import io

from ..comfy_bridge import folders
from .category import CATEGORY


class TeacherLoader(io.ComfyNode):
    """AnimateDiff: an SD1.5 checkpoint with a motion module in it."""

    @classmethod
    def define_schema(cls):
        folders.register_folders()
        return io.Schema(
            node_id="AVDM2TeacherLoader",
            display_name="AVDM2 Teacher Loader",
            category=CATEGORY,
            description="Loads an image model with a motion module: the teacher that makes clips in many steps and whose students "
            "make them in a few. Load Checkpoint and AVDM2 Motion Module in one node.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=folders.checkpoint_choices(),
                    tooltip="An SD1.5 checkpoint from models/checkpoints, or the miniature that comes with this pack.",
                ),
                io.Combo.Input(
                    "motion_module",
                    options=folders.motion_choices(),
                    tooltip="An AnimateDiff motion module from models/animatediff_models. The miniature has its own.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="An SD1.5 MODEL, with its LoRAs, to use in place of the checkpoint's image model.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="teacher"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls, checkpoint, motion_module, model=None) -> io.NodeOutput:
        from ..comfy_bridge.models import load_teacher

        return io.NodeOutput(*load_teacher(checkpoint, motion_module, model))
