"""What a model predicts, where its file says so: this project's schedules, losses and samplers are those of models that predict noise."""

import re
from pathlib import Path

from .containers import Layout
from .paths import is_file, read_json, read_text
from .sentences import FileFormatError, one_line

_KEYS = ("v_pred", "ztsnr")  # empty tensors that merging tools leave as a sign
# Metadata of ModelSpec (Stability-AI/ModelSpec) and of kohya-ss' training scripts, and what they say of a model that predicts noise.
_METADATA = {
    "modelspec.prediction_type": ("", "epsilon", "eps"),
    "ss_v_parameterization": ("", "False", "None"),
    "ss_zero_terminal_snr": ("", "False", "None"),
}
# And a diffusers scheduler's settings.
_SCHEDULER = {"prediction_type": (None, "epsilon"), "rescale_betas_zero_snr": (None, False)}
_YAML = re.compile(r"parameterization:\s*[\"']?(v|x0)\b")  # of the configuration that lies beside a checkpoint under its name


def require_epsilon(path: Path, layout: Layout) -> None:
    """FileFormatError where a checkpoint's keys, metadata or configuration say that it predicts v or x0, or has zero terminal SNR."""
    sign = next((f"the key {key}" for key in _KEYS if key in layout.shapes), None)
    for key, of_epsilon in _METADATA.items():
        said = layout.metadata.get(key, "")
        if said not in of_epsilon:
            sign = sign or f"{key} {one_line(said)!r} in its metadata"
    beside = path.with_suffix(".yaml")
    if sign is None and is_file(beside) and (match := _YAML.search(read_text(beside, "a checkpoint's configuration"))):
        sign = f"parameterization {match[1]} in {beside.name}"
    if sign is not None:
        raise _refusal(path, sign)


def require_epsilon_scheduler(folder: Path) -> None:
    """The same for a folder in the diffusers layout, by its scheduler, if it has one."""
    config = folder / "scheduler" / "scheduler_config.json"
    if not is_file(config):
        return
    said = read_json(config, "a scheduler's configuration")
    if not isinstance(said, dict):
        raise FileFormatError(f"Expected a scheduler's settings by name in {config}, found none; correct or remove it.")
    for key, of_epsilon in _SCHEDULER.items():
        if said.get(key) not in of_epsilon:
            raise _refusal(folder, f"{key} {one_line(said[key])!r} in {config.relative_to(folder)}")


def _refusal(path: Path, sign: str) -> FileFormatError:
    return FileFormatError(
        f"Expected an SD1.5 model that predicts noise (epsilon) at {path}, found signs of another ({sign}): its training and its "
        "schedule are others; choose a model that predicts noise."
    )
