import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel

from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import StyleInfo, student_hash, write_style
from training.miniature.models import new_image_unet, new_motion_adapter, new_text_encoder, write_tokenizer
from training.miniature.vae import new_vae

TIMESTEPS = (999, 600)  # of the students of `model`
FRAMES, SIDE = 4, 32
MAE = {
    "image_size": SIDE, "patch_size": 8, "num_frames": FRAMES, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip


class LikeI3D(torch.nn.Module):
    """Called as the real file is: videos (N, 3, F, H, W) of 0..255, which it rescales by itself."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        assert rescale and resize and return_features
        x = x / 127.5 - 1
        return torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Paths of random networks, each saved as the real one is."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    torch.jit.script(LikeI3D()).save(str(folder / "i3d.pt"))
    VideoMAEModel(VideoMAEConfig(**MAE, use_mean_pooling=False)).save_pretrained(folder / "videomae")
    VideoMAEForVideoClassification(VideoMAEConfig(**MAE)).save_pretrained(folder / "classifier")
    tokenizer = write_tokenizer(folder / "clip", ["a red circle", "a blue square moving left"])
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = side | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    config = CLIPConfig(text_config=text, vision_config=side | {"image_size": SIDE, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained stack on disk, with a student of all weights and one of the motion modules."""
    folder = tmp_path_factory.mktemp("stack")
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder / "tokenizer", ["a red circle", "a blue square"])
    new_text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    new_vae().save_pretrained(folder / "vae")
    image_unet, motion = new_image_unet(), new_motion_adapter()
    for name, parameter in motion.named_parameters():
        if name.endswith("proj_out.weight"):
            nn.init.normal_(parameter, std=0.05)
    image_unet.save_pretrained(folder / "unet")
    motion.save_pretrained(folder / "motion_adapter")
    unet = video_unet(image_unet, motion)
    common = {
        "timesteps": TIMESTEPS,
        "frames": 3,
        "height": 32,
        "width": 48,
        "unet_config": unet_config(unet),
        "base_name": "untrained",
        "base_hash": weights_hash(image_unet),
        "updates": 0,
        "training_config": "",
        "title": "untrained",
        "date": "2025-01-31",
        "license": "Apache-2.0",
    }
    weights = dict(unet.named_parameters())
    write_student(folder / "student.safetensors", weights, StudentInfo(holds="all", **common))
    weights = {name: p for name, p in weights.items() if "motion_modules" in name}
    write_student(folder / "motion.safetensors", weights, StudentInfo(holds="motion", **common))
    return folder


@pytest.fixture(scope="module")
def styles(model):
    """Another image model of the family, and a style file of each student."""
    torch.manual_seed(1)
    new_image_unet().save_pretrained(model / "styles" / "other")
    for name in ("student", "motion"):
        student = read_student(model / f"{name}.safetensors")
        weights = dict(student_unet(student, load_image_unet(model / "unet")).named_parameters())
        layers = [key.removesuffix(".weight") for key in weights if key.endswith("attn2.to_k.weight")]
        pairs = {f"{layer}.lora_A.weight": torch.randn(2, weights[f"{layer}.weight"].shape[1]) for layer in layers}
        pairs |= {f"{layer}.lora_B.weight": torch.randn(len(weights[f"{layer}.weight"]), 2) for layer in layers}
        common = {"title": "other", "date": "2025-01-31", "license": "Apache-2.0", "updates": 1, "training_config": ""}
        hashes = {"hash": weights_hash(load_image_unet(model / "styles" / "other")), "student_hash": student_hash(student)}
        info = StyleInfo(name="other", student_name=name, lora_rank=2, lora_alpha=2.0, **hashes, **common)
        write_style(model / "styles" / f"{name}.safetensors", pairs, info)
    return model / "styles"
