import folder_paths
from comfy_api.latest import io

from .category import CATEGORY


class SparseControlLoader(io.ComfyNode):
    """SparseCtrl: a clip that goes on from given frames."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AVDM2SparseControlLoader",
            display_name="AVDM2 Load SparseCtrl",
            category=CATEGORY,
            description="Loads a SparseCtrl network of AnimateDiff v3, a ControlNet that knows some frames of a clip: start a clip from an "
            "image, or fill in between two. Goes into Apply ControlNet, with the pictures and, for the rgb file, the VAE.",
            inputs=[
                io.Combo.Input(
                    "control_net",
                    options=folder_paths.get_filename_list("controlnet"),
                    tooltip="v3_sd15_sparsectrl_rgb or v3_sd15_sparsectrl_scribble, in models/controlnet.",
                ),
                io.String.Input(
                    "frames",
                    default="0",
                    tooltip="Which frames of the clip the pictures are, one number a picture with commas between: 0 is the first, -1 "
                    "the last.",
                ),
            ],
            outputs=[io.ControlNet.Output(display_name="control_net")],
        )

    @classmethod
    def execute(cls, control_net, frames) -> io.NodeOutput:
        from ..comfy_bridge.folders import model_file
        from ..comfy_bridge.sparse_control import load_sparse_control

        return io.NodeOutput(load_sparse_control(model_file("controlnet", control_net), frames))
