from comfy_api.latest import io

from .category import CATEGORY, denoise_input


class Steps(io.ComfyNode):
    """A student's own steps for core's custom samplers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AVDM2Steps",
            display_name="AVDM2 Steps",
            category=CATEGORY,
            description="The steps that a student was trained at, and the sampler that goes with it, for SamplerCustom and "
            "SamplerCustomAdvanced. Its noise is drawn on the CPU: a seed gives the same clip on every device.",
            inputs=[
                io.Model.Input("student", display_name="model", tooltip="From AVDM2 Student Loader."),
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
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas"), io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls, student, steps, denoise) -> io.NodeOutput:
        from ..comfy_bridge.sampling import student_steps

        return io.NodeOutput(*student_steps(student, steps, denoise))
