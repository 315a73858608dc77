"""ComfyUI for the tests: the checkout that COMFYUI_DIR names, in this process, on the CPU, its folders in a temporary one."""

import asyncio
import importlib
import json
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny, UNetMotionModel
from torch import nn
from transformers import CLIPTextModel

from avdm2_nodes.diffusion.samplers import draw_noise, student_timesteps
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import load_stack
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import StyleInfo, student_hash, write_style
from training.evaluation.sampling import student_sampler, teacher_sampler

ROOT = Path(__file__).resolve().parents[2]
HOW_TO_RUN = "COMFYUI_DIR=/path/to/ComfyUI python -m pytest tests/avdm2_nodes, with a Python that has its requirements and ours"
SCALE = 2.0  # of the latents; a power of two, so that scaling rounds nothing
TIMESTEPS = (999, 800, 600, 300)  # a student's own, which are not the trailing ones
WINDOW, TEACHER_WINDOW = 4, 5
COLOURS = {"latent_rgb_factors": [[0.3, 0, 0], [0, 0.3, 0], [0, 0, 0.3], [0.1, 0.1, 0]], "latent_rgb_factors_bias": [0, 0, 0.2]}
PROMPT = "a large blue circle moving left fast on a checked background"


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    """The checkout; skips where there is none."""
    named = os.environ.get("COMFYUI_DIR")
    if not named:
        pytest.skip(f"needs ComfyUI: {HOW_TO_RUN}")
    if not (Path(named) / "comfy" / "cli_args.py").is_file():
        pytest.skip(f"expected a ComfyUI checkout in COMFYUI_DIR, found none at {named}: {HOW_TO_RUN}")
    return Path(named).resolve()


class ComfyUI:
    """What tests use of ComfyUI, and the pack as ComfyUI loaded it."""

    def __init__(self, base: Path, pack: str, nodes: ModuleType):
        self.base, self.nodes, self._pack, self._extras = base, nodes, pack, set()

    def run(self, node_id: str, **inputs) -> tuple:
        """A node's outputs, run as the server does: without gradients and in inference mode."""
        node = self.nodes.NODE_CLASS_MAPPINGS[node_id]
        with torch.inference_mode():
            result = getattr(node(), node.FUNCTION)(**inputs)
        return getattr(result, "result", result)

    def pack(self, name: str) -> ModuleType:
        """A module of the pack that ComfyUI loaded; its classes are not those of the `avdm2_nodes` that a test imports."""
        return importlib.import_module(f"{self._pack}.avdm2_nodes.{name}")

    def extras(self, *names: str) -> None:
        """Loads files of core's comfy_extras ("nodes_pag"), whose nodes `run` then knows; 0.8 and 0.33 have them in the same files."""
        for name in names:
            if name not in self._extras:
                file = Path(self.nodes.__file__).parent / "comfy_extras" / f"{name}.py"
                assert asyncio.run(self.nodes.load_custom_node(str(file), module_parent="comfy_extras")), name
                self._extras.add(name)

    def student_of(self, model):
        """The student that is in a MODEL, as its file has it."""
        return self.pack("comfy_bridge.facts").student_facts(model).student

    def prompt(self, clip, text=PROMPT):
        return self.run("CLIPTextEncode", clip=clip, text=text)[0]

    def empty(self, frames=3, height=32, width=64) -> dict:
        return self.run("EmptyLatentImage", width=width, height=height, batch_size=frames)[0]


@pytest.fixture(scope="session")
def comfyui(comfyui_dir, tmp_path_factory):
    """ComfyUI with the pack loaded from a link in its custom_nodes; skips where the checkout's requirements are not there."""
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir()
    for kind in ("avdm2", "animatediff_models", "checkpoints", "diffusers", "embeddings", "loras"):
        (base / "models" / kind).mkdir(parents=True)
    link = base / "custom_nodes" / "AVDM2-for.ComfyUI"
    link.symlink_to(ROOT, target_is_directory=True)
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    sys.path.insert(0, str(comfyui_dir))  # and it stays: ComfyUI imports parts of itself when they are used
    try:
        options = importlib.import_module("comfy.options")
        options.enable_args_parsing()
        nodes = importlib.import_module("nodes")
    except ModuleNotFoundError as missing:
        pytest.skip(f"expected this Python to have ComfyUI's requirements, found no {missing.name}: {HOW_TO_RUN}")
    finally:
        sys.argv = arguments
    threads = torch.get_num_threads()
    assert asyncio.run(nodes.load_custom_node(str(link))), "ComfyUI did not load the pack"
    assert torch.get_num_threads() == threads
    (pack,) = {name.removesuffix(".avdm2_nodes") for name in sys.modules if name.endswith(f"{link.suffix[1:]}.avdm2_nodes")}
    return ComfyUI(base, pack, nodes)


# ---- models to sample ----


@pytest.fixture(scope="session")
def node_stack_folder(stack_folder, tmp_path_factory) -> Path:
    """The tiny stack with a VAE of a width that ComfyUI has, and its own image UNet again as the style `same`."""
    folder = tmp_path_factory.mktemp("stacks") / "tiny"
    shutil.copytree(stack_folder, folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(5)
    widths = (64,) * 4
    vae = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, scaling_factor=SCALE)
    nn.init.normal_(vae.decoder.layers[-1].weight, std=0.2)  # so that frames are not all of one grey
    vae.save_pretrained(folder / "vae")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    encoder.half().float().save_pretrained(folder / "text_encoder")  # as files have it: core holds text encoders in float16
    shutil.copytree(folder / "unet", folder / "styles" / "same")
    (folder / "stack.json").write_text(json.dumps({"frames": TEACHER_WINDOW, **COLOURS}))
    return folder


@pytest.fixture(scope="session")
def node_stack(node_stack_folder):
    """That stack as the command line loads it; read only."""
    return load_stack(node_stack_folder)


@pytest.fixture(scope="session")
def students(node_stack, tmp_path_factory) -> dict[str, Path]:
    """Student files of the tiny stack by what they hold, every weight and position encoding moved from the teacher's."""
    folder = tmp_path_factory.mktemp("students")
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    unet = node_stack.teacher
    moved = {name: p + 0.03 * noise(*p.shape) for name, p in unet.named_parameters()}
    moved |= {name: b + 0.3 * noise(*b.shape) for name, b in unet.named_buffers()}
    tensors = {"all": moved, "motion": {name: t for name, t in moved.items() if "motion_modules" in name}}
    lora = dict(tensors["motion"])
    for name, p in unet.named_parameters():
        if "motion_modules" not in name and p.ndim >= 2:  # linear layers, convolutions of both sizes
            module, (out, *into) = name.removesuffix(".weight"), p.shape
            lora[f"{module}.lora_A.weight"] = 0.2 * noise(2, *into)
            lora[f"{module}.lora_B.weight"] = 0.1 * noise(out, 2, *(1 for _ in into[1:]))
    tensors["motion+lora"] = lora
    files = {}
    for holds, weights in tensors.items():
        ranks = {"lora_rank": 2, "lora_alpha": 3.0} if holds == "motion+lora" else {}
        info = StudentInfo(
            holds=holds, timesteps=TIMESTEPS, frames=WINDOW, height=32, width=64, unet_config=unet_config(unet), base_name="tiny",
            base_hash=weights_hash(node_stack.image_unet), updates=7, training_config="seed: 3", title="untrained",
            date="2026-01-31", license="Apache-2.0", **ranks,
        )  # fmt: skip
        files[holds] = folder / f"{holds}.safetensors"
        write_student(files[holds], {name: t.half() for name, t in weights.items()}, info)
    return files


@pytest.fixture(scope="session")
def model_folders(comfyui, node_stack_folder, students):
    """The stack and the students where ComfyUI looks for them."""
    (comfyui.base / "models" / "diffusers" / "tiny").symlink_to(node_stack_folder, target_is_directory=True)
    for holds, file in students.items():
        shutil.copy(file, comfyui.base / "models" / "avdm2" / f"{holds}.safetensors")
    return comfyui.base / "models"


@pytest.fixture(scope="session")
def loaded(comfyui, model_folders):
    """teacher, clip and vae of AVDM2 Teacher Loader, by these names; all tests share their memory, as the nodes of a graph do."""
    outputs = comfyui.run("AVDM2TeacherLoader", checkpoint="tiny", motion_module="the checkpoint's own")
    return SimpleNamespace(**dict(zip(("teacher", "clip", "vae"), outputs, strict=True)))


@pytest.fixture(scope="session")
def load_student(comfyui, model_folders, loaded):
    """load_student("motion"): what AVDM2 Student Loader makes of that file, which all tests share."""

    @cache
    def load(holds):
        return comfyui.run("AVDM2StudentLoader", student=f"{holds}.safetensors", teacher=loaded.teacher)[0]

    return load


@pytest.fixture(scope="session")
def student(load_student):
    return load_student("all")


@pytest.fixture
def styled(comfyui, student):
    """styled((style, strength[, mode]), ..., student=...): a student with these styles one after the other."""

    def add(*styles, student=student, **inputs):
        for style, strength, *mode in styles:
            more = {"mode": mode[0]} if mode else {}
            (student,) = comfyui.run("AVDM2StyleTransfer", student=student, style=style, strength=strength, **more, **inputs)
        return student

    return add


@pytest.fixture
def write_style_file(model_folders):
    """write_style_file(student's file, name): a style file for it in models/avdm2, of random LoRA; taken away again."""
    written = []

    def write(student, name):
        generator = torch.Generator().manual_seed(len(name))
        unet = UNetMotionModel(**student.info.unet_config)
        tensors = {}
        for key, p in unet.named_parameters():
            if "motion_modules" not in key and "attn2.to_" in key and p.ndim == 2:
                module = key.removesuffix(".weight")
                tensors[f"{module}.lora_A.weight"] = torch.randn(2, p.shape[1], generator=generator)
                tensors[f"{module}.lora_B.weight"] = torch.randn(p.shape[0], 2, generator=generator)
        info = StyleInfo(
            name=name, hash="0" * 64, student_name="tiny", student_hash=student_hash(student), lora_rank=2, lora_alpha=1.0,
            updates=5, training_config="seed: 3", title=name, date="2026-01-31", license="Apache-2.0",
        )  # fmt: skip
        written.append(model_folders / "avdm2" / f"{name}.safetensors")
        write_style(written[-1], tensors, info)
        return written[-1]

    yield write
    for file in written:
        file.unlink()


# ---- what the command line makes of them ----


@pytest.fixture(scope="session")
def student_network(node_stack, students):
    """student_network("motion"): the video UNet of that file as the command line builds it, in float32, as core computes on a CPU."""
    return cache(lambda holds: student_unet(read_student(students[holds]), node_stack.image_unet))


def as_latent(clip):
    """A clip in model space (1, C, F, h, w) as ComfyUI's LATENT samples (F, C, h, w)."""
    return clip[0].transpose(0, 1) / SCALE


@pytest.fixture(scope="session")
def student_reference(student_network, students):
    """student_reference(holds, text, (F, C, h, w), seed, steps): the LATENT of training/sample.py's own chain."""

    @torch.no_grad()
    def sample(holds, text, shape, seed, steps=4):
        info = read_student(students[holds]).info
        frames, channels, height, width = shape
        generators = [torch.Generator().manual_seed(seed)]
        noise = draw_noise((1, channels, frames, height, width), generators)
        sampler = student_sampler(student_network(holds), student_timesteps(info.timesteps, steps), info.frames)
        return as_latent(sampler(noise, text, generators))

    return sample


@pytest.fixture(scope="session")
def teacher_reference(node_stack):
    """teacher_reference(text, empty_text, (F, C, h, w), seed, steps, cfg): likewise of the teacher."""

    def sample(text, empty_text, shape, seed, steps, cfg):
        frames, channels, height, width = shape
        generators = [torch.Generator().manual_seed(seed)]
        noise = draw_noise((1, channels, frames, height, width), generators)
        return as_latent(teacher_sampler(node_stack.teacher, empty_text, steps, cfg, TEACHER_WINDOW)(noise, text, generators))

    return sample


# ---- looking on ----


@pytest.fixture
def evaluations(loaded):
    """(x_t (N, C, h, w) in model space, timestep) of each evaluation by the shared network, as it gets them."""
    seen = []

    def look(network, inputs):
        seen.append((inputs[0].clone(), round(float(inputs[1].flatten()[0]))))

    handle = loaded.teacher.model.diffusion_model.register_forward_pre_hook(look)
    yield seen
    handle.remove()


@pytest.fixture
def progress(comfyui):
    """(step, steps, preview) of each update of ComfyUI's progress bar, as its server gets them."""
    utils = importlib.import_module("comfy.utils")
    seen = []
    utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: seen.append((value, total, preview)))
    yield seen
    utils.set_progress_bar_global_hook(None)
