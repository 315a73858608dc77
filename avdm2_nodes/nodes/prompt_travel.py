from comfy_api.latest import io

from .category import CATEGORY


class PromptTravel(io.ComfyNode):
    """A prompt that changes over the frames."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AVDM2PromptTravel",
            display_name="AVDM2 Prompt Travel",
            category=CATEGORY,
            description="Prompts at some frames, blended between them: each frame gets its own. Goes into any sampler "
            "with a motion module or a "
            "student, and follows context windows.",
            inputs=[
                io.Clip.Input("clip", tooltip="From Load Checkpoint or AVDM2 Load Miniature."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="0: a red circle\n8: a blue circle",
                    tooltip="A line for each prompt: the frame, a colon, the prompt. Before the first and after the last nothing "
                    "changes.",
                ),
                io.Int.Input("frames", default=16, min=1, max=4096, tooltip="Of the clip: the latent's batch_size."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, clip, prompts, frames) -> io.NodeOutput:
        from ..comfy_bridge.prompts import travelling_prompt

        return io.NodeOutput(travelling_prompt(clip, prompts, frames))
