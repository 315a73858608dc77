from comfy_api.latest import io

from .category import CATEGORY, denoise_input, latent_input, seed_input


class TeacherSampler(io.ComfyNode):
    """A clip in many guided steps, to compare a student with."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AVDM2TeacherSampler",
            display_name="AVDM2 Teacher Sampler",
            category=CATEGORY,
            description="Makes a clip with a teacher, by DDIM with guidance at trailing timesteps: two evaluations a step. The same seed "
            "starts from the same noise as the student, for an honest comparison. KSampler samples a teacher as well.",
            inputs=[
                io.Model.Input("teacher", tooltip="From AVDM2 Teacher Loader or AVDM2 Motion Module."),
                io.Conditioning.Input("positive", tooltip="What the clip shows, from CLIP Text Encode."),
                latent_input(),
                seed_input(),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Steps of DDIM, at trailing timesteps."),
                io.Float.Input(
                    "cfg",
                    default=3.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance; at 1 a step is one evaluation, without guidance.",
                ),
                denoise_input("1 makes a new clip; less keeps more of the latent."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the clip is guided away from. Without it, the empty prompt of AVDM2 Teacher Loader's CLIP.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, teacher, positive, latent, seed, steps, cfg, denoise, negative=None) -> io.NodeOutput:
        from ..comfy_bridge.sampling import teacher_latent

        return io.NodeOutput(teacher_latent(teacher, positive, negative, latent, seed, steps, cfg, denoise))
