from comfy_api.latest import io

from ..comfy_bridge import folders
from .category import CATEGORY


class StackLoader(io.ComfyNode):
    """A small stack, or any in the diffusers layout, as core's own kinds of model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AVDM2StackLoader",
            display_name="AVDM2 Load Miniature",
            category=CATEGORY,
            description="Loads the miniature that comes with this pack, or an SD1.5 model in a folder of the "
            "diffusers layout, as MODEL, CLIP "
            "and VAE like Load Checkpoint: an image model, without motion. For a checkpoint in one file use Load Checkpoint.",
            inputs=[
                io.Combo.Input(
                    "stack",
                    options=list(folders.stack_folders()),
                    tooltip="The miniature, which needs no download, or a folder in models/diffusers.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls, stack) -> io.NodeOutput:
        from ..comfy_bridge.native import load_native_stack

        return io.NodeOutput(*load_native_stack(folders.stack_folder(stack)))
