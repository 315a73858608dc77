from comfy_api.latest import io

from ..comfy_bridge import folders
from .category import CATEGORY

STUDENT_FILE, ANIMATEDIFF_FILES = "student file", "AnimateDiff files"


class SaveStudent(io.ComfyNode):
    """A student as a file that the loader reads, or as files that other packs read."""

    @classmethod
    def define_schema(cls):
        folders.register_folders()
        return io.Schema(
            node_id="AVDM2SaveStudent",
            display_name="AVDM2 Save Student",
            category=CATEGORY,
            description="Writes a student to models/avdm2, where AVDM2 Student Loader finds it, or as an AnimateDiff motion module and "
            "a LoRA for other packs.",
            inputs=[
                io.Model.Input(
                    "student",
                    tooltip="The student to save. Styles in its weights (transplant, style files) are merged into a whole student, named "
                    "in the file with hash, mode and strength; one that guides the sampling fits no file and is refused.",
                ),
                io.String.Input(
                    "name",
                    default="student",
                    tooltip="The file's name; it may have subfolders, and stays in its models folder.",
                ),
                io.Combo.Input(
                    "format",
                    options=[STUDENT_FILE, ANIMATEDIFF_FILES],
                    default=STUDENT_FILE,
                    optional=True,
                    tooltip="A student file goes to models/avdm2. AnimateDiff files are for other packs: a motion module in "
                    "models/animatediff_models and, where the student has one, a LoRA in models/loras.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, student, name, format=STUDENT_FILE) -> io.NodeOutput:
        from ..comfy_bridge.progress import show_text
        from ..comfy_bridge.saving import export_student, save_student

        paths = export_student(student, name) if format == ANIMATEDIFF_FILES else [save_student(student, name)]
        texts = [str(path) for path in paths]
        show_text("\n".join(texts))
        return io.NodeOutput(ui={"text": texts})
