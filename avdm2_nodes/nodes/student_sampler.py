from comfy_api.latest import io

from .category import CATEGORY, denoise_input, latent_input, seed_input


class StudentSampler(io.ComfyNode):
    """A clip in a few evaluations."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AVDM2StudentSampler",
            display_name="AVDM2 Student Sampler",
            category=CATEGORY,
            description="Makes a clip with a student in its own steps: SamplerCustom with AVDM2 Steps in one node. Longer clips than the "
            "student knows are made in overlapping windows.",
            inputs=[
                io.Model.Input("student", tooltip="From AVDM2 Student Loader."),
                io.Conditioning.Input("positive", tooltip="What the clip shows, from CLIP Text Encode."),
                latent_input(),
                seed_input(),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=50,
                    tooltip="Evaluations. 0 takes the number that the student was trained for, mostly 4, which is best.",
                ),
                denoise_input(
                    "1 makes a new clip; less keeps more of the latent: sampling starts at the student's first step at or below "
                    "1000 x denoise."
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="1 is what a student was trained for. Above it a negative prompt acts, a step is two "
                    "evaluations, and colours burn "
                    "beyond 2.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What the clip is guided away from, with cfg above 1."
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, student, positive, latent, seed, steps, denoise, cfg=1.0, negative=None) -> io.NodeOutput:
        from ..comfy_bridge.sampling import student_latent

        return io.NodeOutput(student_latent(student, positive, latent, seed, steps, denoise, cfg, negative))
