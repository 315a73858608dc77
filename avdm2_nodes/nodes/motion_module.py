from comfy_api.latest import io

from ..comfy_bridge import folders
from .category import CATEGORY, clips_input


class MotionModule(io.ComfyNode):
    """AnimateDiff: motion in an SD1.5 MODEL."""

    @classmethod
    def define_schema(cls):
        folders.register_folders()
        return io.Schema(
            node_id="AVDM2MotionModule",
            display_name="AVDM2 Motion Module",
            category=CATEGORY,
            description="Puts an AnimateDiff motion module into any SD1.5 model, so that a latent whose batch is "
            "frames becomes a clip: the "
            "teacher, made in many guided steps. LoRAs, ControlNets, IP-Adapters, masks and core's samplers work as with images. Clips "
            "longer than 16 frames are made in overlapping windows; Context Windows (Manual) after this node sets others.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Checkpoint, with its LoRAs, or from AVDM2 Load Miniature."),
                io.Combo.Input(
                    "motion_module",
                    options=folders.module_choices(),
                    tooltip="An AnimateDiff motion module from models/animatediff_models, or the miniature's for the miniature.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much motion: 0 makes single images, above 1 exaggerates.",
                ),
                clips_input(),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, motion_module, strength=1.0, clips=1) -> io.NodeOutput:
        from ..comfy_bridge.models import add_motion

        return io.NodeOutput(add_motion(model, motion_module, strength, clips))
