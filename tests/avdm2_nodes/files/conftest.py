"""A small student in each of the forms that a file holds, for the tests of student files; read only."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.student import write_student
from avdm2_nodes.files.student_info import StudentInfo
from tests.avdm2_nodes.files.students import ALPHA, RANK, TARGETS, image_unet, motion_adapter


@pytest.fixture(scope="module")
def base():
    return image_unet()


@pytest.fixture(scope="module")
def unet(base):
    return video_unet(base, motion_adapter()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def info(base, unet):
    return StudentInfo(
        holds="all",
        timesteps=(999, 749, 499, 249),
        frames=8,
        height=64,
        width=48,
        unet_config=unet_config(unet),
        base_name="a base",
        base_hash=weights_hash(base),
        score_name="a style – neon",
        score_hash="0" * 64,
        updates=150,
        training_config="run: {seed: 1}\nsdm:\n  weight: 0.5\n",
        title="A student",
        date="2025-01-31",
        license="Apache-2.0",
    )


@pytest.fixture(scope="module")
def motion_tensors(unet):
    return {name: p for name, p in unet.named_parameters() if "motion_modules" in name}


@pytest.fixture(scope="module")
def adapted(unet):
    """The video UNet with peft's LoRA on spatial layers, linear and convolutional, nothing of it zero."""
    adapted = copy.deepcopy(unet)
    spatial = [name for name, _ in adapted.named_modules() if "motion_modules" not in name]
    targets = [name for name in spatial if re.fullmatch(TARGETS, name)]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), adapted, adapter_name="s")
    torch.manual_seed(2)
    for name, p in adapted.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn(p.shape) * 0.05
    return adapted.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lora_tensors(adapted):
    return {n.replace(".s.weight", ".weight"): p for n, p in adapted.named_parameters() if n.endswith(".s.weight")}


@pytest.fixture(scope="module")
def lora_info(info):
    return replace(info, holds="motion+lora", lora_rank=RANK, lora_alpha=ALPHA)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a student.safetensors"


@pytest.fixture
def whole(path, info, unet):
    write_student(path, dict(unet.named_parameters()), info)
    return path
