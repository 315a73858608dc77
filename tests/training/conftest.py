import pytest
import torch
from transformers import CLIPConfig, CLIPModel, VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel

from training.miniature.models import write_tokenizer

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
