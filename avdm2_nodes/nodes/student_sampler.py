from comfy_api.latest import io

from .types import CATEGORY, StudentWire


class StudentSampler(io.ComfyNode):
    """A clip in a few evaluations, without guidance."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AVDM2StudentSampler",
            display_name="AVDM2 Student Sampler",
            category=CATEGORY,
            description="Makes a clip with a student: one evaluation a step, no guidance and no negative prompt. Longer clips than "
            "the student knows are made in overlapping windows.",
            inputs=[
                StudentWire.Input("student", tooltip="From AVDM2 Student Loader."),
                io.Conditioning.Input("positive", tooltip="What the clip shows, from CLIP Text Encode."),
                io.Latent.Input(
                    "latent",
                    tooltip="Empty Latent Image with batch_size as the number of frames; or frames from VAE Encode, for "
                    "video to video with denoise below 1.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same clip, whatever the device.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=50,
                    tooltip="Evaluations. 0 takes the number that the student was trained for, mostly 4, which is best.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 makes a new clip; less keeps more of the latent: sampling starts at the student's first step at or "
                    "below 1000 x denoise.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, student, positive, latent, seed, steps, denoise) -> io.NodeOutput:
        from ..comfy_bridge.sampling import student_latent

        return io.NodeOutput(student_latent(student, positive, latent, seed, steps, denoise))
