import copy
import os
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, MotionAdapter, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from avdm2_nodes.files.stack import load_stack
from training.evaluation.feature_net import FeatureConfig, VideoFeatures, save_features
from training.method.discriminator import heads_for
from training.method.loop import Distillation
from training.method.setup import new_roles
from training.miniature.models import write_tokenizer
from training.run.config import from_yaml
from training.world import scenes

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start: threads of several would wait for one another

WIDTHS, TEXT_WIDTH, TOKENS = (32, 32, 64), 32, 32


def new_image_unet(widths=WIDTHS):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,  # with one channel a group the normalisation would swallow the time embedding
    )


def new_motion(widths=WIDTHS):
    """Motion modules whose effect is as large as that of the untrained spatial layers, so that a test sees it."""
    return MotionAdapter(
        block_out_channels=widths, motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8,
        use_motion_mid_block=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def stack_folder(tmp_path_factory) -> Path:
    """A tiny untrained stack in the diffusers layout, with a feature net; read only."""
    folder = tmp_path_factory.mktemp("stack") / "tiny"
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder / "tokenizer", [content.caption for content in scenes.all_contents()])
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, scaling_factor=2.0)
    vae.save_pretrained(folder / "vae")
    new_image_unet().save_pretrained(folder / "unet")
    new_image_unet().save_pretrained(folder / "styles" / "other")
    new_motion().save_pretrained(folder / "motion_adapter")
    save_features(VideoFeatures(FeatureConfig((8, 8, 8), 16)).eval(), folder / "feature_net.safetensors")
    return folder


@pytest.fixture(scope="session")
def _loaded_stack(stack_folder):
    return load_stack(stack_folder)


@pytest.fixture
def stack(_loaded_stack):
    """The tiny stack, loaded; each test has its own copy of the weights."""
    return copy.deepcopy(_loaded_stack)


@pytest.fixture
def make_image_unet():
    return new_image_unet


@pytest.fixture
def make_motion():
    return new_motion


@pytest.fixture(scope="session")
def make_config():
    """make_config(sdm={"weight": 0}, ...): the settings of a tiny run, float32, with some of them replaced."""
    tiny = {
        "run": {"updates": 3, "batch": 2, "precision": "float32", "threads": 1, "device": "cpu", "save_every": 1},
        "data": {"frames": 8},
        "method": {},
        "model": {"lora_rank": 2},
        "student": {"warmup": 2, "lr": 1e-3},
        "sdm": {"lr": 1e-3, "updates_per_student": 1},
        "adm": {"lr": 1e-3, "updates_per_student": 1, "width": 16},
        "warmup": {"updates": 0},
        "style": {"image_steps": 4, "image_batch": 2},
        "evaluation": {"clips": 6, "teacher_steps": 1},
    }

    def make(**changes):
        values = {key: (tiny[key] | changes.get(key, {}) if isinstance(tiny[key], dict) else tiny[key]) for key in tiny}
        values |= {key: value for key, value in changes.items() if not isinstance(value, dict)}
        return from_yaml(yaml.safe_dump(values))

    return make


@pytest.fixture(scope="session")
def make_distillation():
    """make_distillation(stack, config): a run's state on that stack, its discriminator heads narrow."""

    def make(stack, config, score_unet=None, processes=None):
        roles = new_roles(config, stack, score_unet, half=config.run.precision == "bf16")
        torch.manual_seed(0)
        heads = heads_for(list(WIDTHS), config)
        return Distillation(config, roles, heads, torch.zeros(1, TOKENS, TEXT_WIDTH), torch.device("cpu"), processes)

    return make


class RandomClips:
    """Stands for LatentClips: clips and texts that their numbers fix."""

    def __init__(self, count=5, frames=4, side=8):
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        self.clips = torch.stack([torch.randn(4, frames, side, side, generator=g) for g in generators])
        self.texts = torch.stack([torch.randn(TOKENS, TEXT_WIDTH, generator=g) for g in generators])

    def __len__(self):
        return len(self.clips)

    def batch(self, indices, clips=True):
        return self.clips[indices] if clips else torch.zeros_like(self.clips[indices]), self.texts[indices]


@pytest.fixture(scope="session")
def random_clips():
    return RandomClips()
