from comfy_api.latest import io

from ..comfy_bridge import files
from .types import CATEGORY, StudentWire


class StyleTransfer(io.ComfyNode):
    """A student guided by another image model."""

    @classmethod
    def define_schema(cls):
        files.register_folders()
        return io.Schema(
            node_id="AVDM2StyleTransfer",
            display_name="AVDM2 Style Transfer",
            category=CATEGORY,
            description="Restyles a student's clips with another image model of the same family: after each step the frames are pulled "
            "by what this model sees otherwise than the student's own. Four image evaluations a frame and step; no training. "
            "Several of these nodes add up.",
            inputs=[
                StudentWire.Input("student", tooltip="From AVDM2 Student Loader, or from another Style Transfer."),
                io.Combo.Input(
                    "style",
                    options=files.style_choices(),
                    tooltip="The image model whose style is wanted: an SD1.5 checkpoint, or the style that comes with this pack.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How far the frames are pulled; 0 leaves them as they are.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="An SD1.5 MODEL, with its LoRAs, to use in place of the style above."
                ),
            ],
            outputs=[StudentWire.Output(display_name="student")],
        )

    @classmethod
    def execute(cls, student, style, strength, model=None) -> io.NodeOutput:
        from ..comfy_bridge.models import with_style

        return io.NodeOutput(with_style(student, style, model, strength))
