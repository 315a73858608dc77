"""The settings of a distillation: what must agree between their sections, and their YAML."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import yaml
from pydantic import (
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from avdm2_nodes.files.sentences import one_line
from training.run.sections import (
    ROOT,
    AdmConfig,
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    SdmConfig,
    Section,
    StudentConfig,
    StyleConfig,
    WarmupConfig,
    portable,
)
from training.run.wording import said, sentences

MODEL = ROOT / "miniature"  # what commands take where no model is named
STUDENT = MODEL / "student.safetensors"
_LONGEST = 1500  # characters of a sentence about settings


class ConfigError(ValueError):
    """Settings that cannot be used; the message has one sentence for each problem, each on a line of its own."""

    def __init__(self, message: str = ""):
        super().__init__("\n".join(one_line(line, _LONGEST) for line in message.split("\n")))


class DistillConfig(BaseSettings):
    """Distil a video diffusion teacher into a few-step student."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    run: RunConfig = Field(RunConfig(), description="the run as a whole")
    data: DataConfig = Field(DataConfig(), description="the clips that it learns from")
    model: ModelConfig = Field(ModelConfig(), description="the networks")
    student: StudentConfig = Field(StudentConfig(), description="the student and its optimiser")
    method: MethodConfig = Field(MethodConfig(), description="how the student learns")
    sdm: SdmConfig = Field(SdmConfig(), description="2D score distribution matching")
    adm: AdmConfig = Field(AdmConfig(), description="adversarial distribution matching")
    warmup: WarmupConfig = Field(WarmupConfig(), description="what comes before distribution matching")
    style: StyleConfig = Field(StyleConfig(), description="the style that model.train style gives a finished student")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="the report at the end")

    @property
    def matches_frames(self) -> bool:
        """Whether the run has SDM, and a fake score that learns."""
        return self.method.kind == "avdm2" and self.sdm.weight > 0

    @property
    def has_heads(self) -> bool:
        """Whether the run has a discriminator that learns."""
        return self.method.kind != "consistency" and self.adm.weight > 0

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **_):
        return (init_settings,)  # no environment variables: a run is what its file and command line say

    @model_validator(mode="after")
    def _agree(self):
        run, steps, problems = self.run, self.student.steps, []
        if run.accumulate != "auto" and run.batch % run.accumulate:
            problems.append(
                f"run.batch: expected a multiple of run.accumulate ({run.accumulate}), found {run.batch}; change one."
            )
        if not steps:
            problems.append("student.steps: expected at least one timestep, found none; name them.")
        if any(a <= b for a, b in pairwise(steps)):
            problems.append(f"student.steps: expected strictly descending timesteps, found {list(steps)}; reorder them.")
        if run.updates + self.warmup.updates == 0:
            problems.append(
                "run.updates, warmup.updates: expected at least one above 0, found both 0; nothing would be learnt."
            )
        if self.sdm.weight == 0 and self.adm.weight == 0:
            problems.append(
                "sdm.weight, adm.weight: expected at least one above 0, found both 0; the student would learn nothing."
            )
        if self.method.kind != "avdm2" and self.model.train == "style":
            problems.append(
                f"method.kind: expected avdm2 where model.train is style, found {self.method.kind}; the others learn no style."
            )
        if self.method.kind == "progressive" and self.adm.pool:
            problems.append(
                f"adm.pool: expected 0 where method.kind is progressive, found {self.adm.pool}; its heads judge the newest clips only."
            )
        if self.sdm.frames > self.data.frames:
            problems.append(
                f"sdm.frames: expected at most data.frames ({self.data.frames}), found {self.sdm.frames}; lower it."
            )
        for name, part in (("sdm", self.sdm), ("adm", self.adm)):
            if part.t_min >= part.t_max:
                problems.append(
                    f"{name}.t_min: expected less than {name}.t_max ({part.t_max}), found {part.t_min}; change one."
                )
        if self.model.share_base and self.model.train == "all":
            problems.append(
                "model.share_base: expected false where model.train is all, found true; a base that all share stays frozen, "
                "so train motion+lora or motion."
            )
        model, images = self.model, self.style.images
        if model.train == "style" and model.student is None:
            problems.append(
                "model.student: expected a student file where model.train is style, found null; name the student to be restyled."
            )
        if model.train == "style" and (model.score_unet is None) == (images is None):
            found = "neither" if images is None else "both"
            problems.append(
                f"model.score_unet, style.images: expected one of them where model.train is style, found {found}; "
                "name an image model of the style, or a folder of images that show it."
            )
        if model.train != "style" and images is not None:
            problems.append(
                f"style.images: expected null where model.train is {model.train}, found {portable(images)}; set model.train style."
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


_MOST_VALUES = 10_000  # that a YAML may stand for

# What may change between a run and its resumption: it bears on where, how long and how fast, not on what is learnt.
RESUMABLE_CHANGES = frozenset(
    {
        "run.folder", "run.updates", "run.accumulate", "run.sample_every", "run.save_every", "run.keep", "run.threads", "run.device",
        "data.render", "data.strict", "model.gradient_checkpointing",
        "evaluation.world", "evaluation.clips", "evaluation.teacher_steps", "evaluation.teacher_guidance",
        "evaluation.report",
    }
)  # fmt: skip


def to_yaml(config: DistillConfig) -> str:
    """Every setting as YAML; paths inside the repository are relative to its root, so the text can move with it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None)


def from_yaml(text: str, name: str = "the settings") -> DistillConfig:
    """The settings that a text in YAML says, defaults for the rest; ConfigError (which says `name`) as `load_config`."""
    return validated(parse_yaml(text, name), name)


def training_changes(earlier: str, config: DistillConfig) -> list[str]:
    """What differs between an earlier run's `to_yaml` and `config`, of what bears on training: "sdm.weight 0.5, was 1.0".

    A setting that the earlier run did not know has its default there: a new one leaves earlier runs as they were.
    """
    defaults, now = (flat(c.model_dump(mode="json")) for c in (DistillConfig(), config))
    was = defaults | flat(parse_yaml(earlier, "the earlier settings"))
    keys = [key for key in now | was if key not in RESUMABLE_CHANGES and was.get(key) != now.get(key)]
    return [f"{key} {said(now.get(key))}, was {said(was.get(key))}" for key in keys]


def parse_yaml(text: str, name: str) -> dict:
    """The sections of a text in YAML, not yet checked; ConfigError (which says `name`) where there are none."""
    try:
        values = _plain(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError of a number with thousands of digits, or a date that is none
        cause = " ".join(str(error).split()).partition("; use sys.")[0]  # advice for who writes Python
        raise ConfigError(f"Expected YAML in {name}, found: {cause}; correct it.") from error
    except RecursionError as error:
        raise ConfigError(f"Expected YAML in {name}, found it nested too deep; correct it.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"Expected sections of settings in {name}, found {said(values)}; see training/configs for an example."
        )
    # A section whose every line is commented out reads as null.
    return {str(key): {} if value is None and key in DistillConfig.model_fields else value for key, value in values.items()}


def _plain(text: str) -> Any:
    """As yaml.safe_load, but ValueError where aliases stand for more than a few thousand values: nine short lines can be billions."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_VALUES:
            raise ValueError(f"aliases that stand for more than {_MOST_VALUES} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for; infinitely many where it contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def validated(values: dict, name: str, on_command_line: Iterable[str] = ()) -> DistillConfig:
    """Settings of plain values, which come from the file `name` but for those `on_command_line`. ConfigError, all problems at once."""
    try:
        return DistillConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(sentences(error, name, on_command_line, [*KEYS, *DistillConfig.model_fields])) from error


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """{section: {key: value}} as {section.key: value}."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def fields():
    """Yields (section or "", key, field) of every setting."""
    for name, field in DistillConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from ((name, key, inner) for key, inner in field.annotation.model_fields.items())
        else:
            yield "", name, field


KEYS = [f"{section}.{key}".lstrip(".") for section, key, _ in fields()]
