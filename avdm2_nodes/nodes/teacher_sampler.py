from comfy_api.latest import io

from .types import CATEGORY, TeacherWire


class TeacherSampler(io.ComfyNode):
    """A clip in many guided steps, to compare a student with."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AVDM2TeacherSampler",
            display_name="AVDM2 Teacher Sampler",
            category=CATEGORY,
            description="Makes a clip with the teacher, by DDIM with guidance: two evaluations a step. The same seed starts from the "
            "same noise as the student, for an honest comparison.",
            inputs=[
                TeacherWire.Input("teacher", tooltip="From AVDM2 Teacher Loader."),
                io.Conditioning.Input("positive", tooltip="What the clip shows, from CLIP Text Encode."),
                io.Latent.Input(
                    "latent", tooltip="Empty Latent Image with batch_size as the number of frames, or frames from VAE Encode."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same clip, whatever the device.",
                ),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Steps of DDIM, at trailing timesteps."),
                io.Float.Input(
                    "cfg",
                    default=3.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance; at 1 a step is one evaluation, without guidance.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 makes a new clip; less keeps more of the latent.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the clip is guided away from. Without it, the empty prompt.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, teacher, positive, latent, seed, steps, cfg, denoise, negative=None) -> io.NodeOutput:
        from ..comfy_bridge.sampling import teacher_latent

        return io.NodeOutput(teacher_latent(teacher, positive, negative, latent, seed, steps, cfg, denoise))
