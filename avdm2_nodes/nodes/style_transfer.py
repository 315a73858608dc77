from comfy_api.latest import io

from ..comfy_bridge import folders
from .category import CATEGORY

GUIDANCE, TRANSPLANT = "guidance", "transplant"


class StyleTransfer(io.ComfyNode):
    """A student with another image model's look."""

    @classmethod
    def define_schema(cls):
        folders.register_folders()
        return io.Schema(
            node_id="AVDM2StyleTransfer",
            display_name="AVDM2 Style Transfer",
            category=CATEGORY,
            description="Gives a student's clips another image model's look: by a style file that AVDM2 Style Training made, by that "
            "model's guidance while sampling, or by its weights in place of the student's base. Several of these nodes add up.",
            inputs=[
                io.Model.Input("student", tooltip="From AVDM2 Student Loader, or from another Style Transfer."),
                io.Combo.Input(
                    "style",
                    options=folders.style_choices(),
                    tooltip="A style file from models/avdm2, which costs no evaluations and needs no mode; or an image model, an SD1.5 "
                    "checkpoint or a style that comes with this pack, used as mode says.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of the style; 0 leaves the clip as it is, to the bit.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="An SD1.5 MODEL, with its LoRAs, to use in place of the style above."
                ),
                io.Combo.Input(
                    "mode",
                    options=[GUIDANCE, TRANSPLANT],
                    default=GUIDANCE,
                    optional=True,
                    tooltip="How an image model is used. guidance: after each step the frames are pulled by what it sees otherwise than "
                    "the student's base, two image evaluations a frame and pull. transplant: its weights take the place of the base's "
                    "under what the student has learnt, no evaluations more.",
                ),
                io.Conditioning.Input(
                    "prompt",
                    optional=True,
                    tooltip="For guidance by a model with a text encoder of its own: the prompt, encoded by that model's CLIP. Without it, "
                    "the student's.",
                ),
                io.Int.Input(
                    "pulls",
                    default=1,
                    min=1,
                    max=8,
                    optional=True,
                    tooltip="For guidance: how often the frames are pulled after each step; each costs two image evaluations a frame.",
                ),
            ],
            outputs=[io.Model.Output(display_name="student")],
        )

    @classmethod
    def execute(cls, student, style, strength, model=None, mode=GUIDANCE, prompt=None, pulls=1) -> io.NodeOutput:
        from ..comfy_bridge.styles import with_style

        return io.NodeOutput(with_style(student, style, strength, model, mode, prompt, pulls))
