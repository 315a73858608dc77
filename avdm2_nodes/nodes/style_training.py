from comfy_api.latest import io

from ..comfy_bridge import folders
from .category import CATEGORY, motion_module_input


class StyleTraining(io.ComfyNode):
    """A style, learnt for a student in a process of its own."""

    @classmethod
    def define_schema(cls):
        folders.register_folders()
        return io.Schema(
            node_id="AVDM2StyleTraining",
            display_name="AVDM2 Style Training",
            category=CATEGORY,
            description="Trains a student further so that its clips have the look of another image model or of a folder of pictures, at no "
            "cost when they are made. Takes minutes, in a process of its own: ComfyUI's models are unloaded first, an interrupt stops "
            "it, and the same settings go on from there. The style is a small file in models/avdm2.",
            inputs=[
                io.Model.Input("student", tooltip="From AVDM2 Student Loader, without styles."),
                io.Combo.Input(
                    "style",
                    options=folders.style_sources(),
                    tooltip="The image model whose look is wanted, an SD1.5 checkpoint or the one that comes with this pack, or a folder "
                    "of pictures in ComfyUI's input folder.",
                ),
                io.String.Input(
                    "name",
                    default="my style",
                    tooltip="The name of the style's file in models/avdm2 and of its folder in output/AVDM2; it may have subfolders.",
                ),
                io.Int.Input(
                    "updates",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="How long it learns; 0 takes the number that was found to be enough. With another number, give another name.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What it learns the style on: prompts as for clips, one a line, 50 or more. A student of the miniature has "
                    "its own and needs none.",
                ),
                motion_module_input(),
            ],
            outputs=[io.Model.Output(display_name="student")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, student, style, name, updates, prompts="", motion_module=folders.AS_WIRED) -> io.NodeOutput:
        from ..comfy_bridge.progress import show_trained
        from ..comfy_bridge.style_training import train_style

        trained = train_style(student, style, name, updates, prompts, motion_module)
        return io.NodeOutput(trained.student, ui=show_trained(trained))
