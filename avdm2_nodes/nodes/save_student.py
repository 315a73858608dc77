from comfy_api.latest import io

from ..comfy_bridge import files
from .types import CATEGORY, StudentWire


class SaveStudent(io.ComfyNode):
    """A student as a file that the loader reads."""

    @classmethod
    def define_schema(cls):
        files.register_folders()
        return io.Schema(
            node_id="AVDM2SaveStudent",
            display_name="AVDM2 Save Student",
            category=CATEGORY,
            description="Writes a student to models/avdm2, where AVDM2 Student Loader finds it.",
            inputs=[
                StudentWire.Input(
                    "student", tooltip="The student to save. Styles that guide its sampling are not in the file."
                ),
                io.String.Input(
                    "name", default="student", tooltip="The file's name; it may have subfolders, and stays in models/avdm2."
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, student, name) -> io.NodeOutput:
        from ..comfy_bridge.models import save_student

        return io.NodeOutput(ui={"text": [str(save_student(student, name))]})
