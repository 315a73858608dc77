import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer, VideoMAEModel

from tests.training.conftest import FRAMES, SIDE
from training.evaluation.backbones import BackboneError, clip_scores, features_of, load_clip, load_i3d, load_videomae


@pytest.fixture
def clips():
    return torch.randint(0, 256, (5, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_i3d_sees_whole_videos_of_0_to_255(networks, clips):
    x = clips.numpy().astype(np.float64) / 127.5 - 1
    flat = x.transpose(0, 4, 1, 2, 3).reshape(5, 3, -1)
    expected = np.concatenate([flat.mean(2), flat.std(2, ddof=1)], 1)
    features = features_of(load_i3d(networks / "i3d.pt"), lambda i: clips[i], 5, "FVD", batch=2)
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["videomae", "classifier"])
def test_videomae_features_are_the_mean_of_its_last_tokens(networks, clips, name):
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy((clips.numpy() / 255 - mean) / deviation).float().permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        expected = VideoMAEModel.from_pretrained(networks / name)(pixels).last_hidden_state
    features = load_videomae(networks / name)(clips)
    assert features.shape == (5, 16)
    torch.testing.assert_close(features, expected.mean(1), rtol=1e-4, atol=1e-5)


def test_videomae_reads_other_sizes_and_refuses_other_lengths(networks, clips):
    extractor = load_videomae(networks / "videomae")
    grey = torch.full((1, FRAMES, 48, 80, 3), 100, dtype=torch.uint8)
    torch.testing.assert_close(extractor(grey), extractor(torch.full((1, FRAMES, SIDE, SIDE, 3), 100, dtype=torch.uint8)))
    with pytest.raises(BackboneError, match=r"clips of 4 frames for VideoMAE from .*, found 3; set --frames 4\."):
        extractor(clips[:, :3])


def test_clipscore_is_the_mean_cosine_of_frames_and_caption(networks, clips):
    captions = ["a red circle", "a blue square moving left " * 40]
    score = load_clip(networks / "clip")
    found = clip_scores(score, lambda i: clips[i], captions, "CLIPScore")
    model, tokenizer = CLIPModel.from_pretrained(networks / "clip"), CLIPTokenizer.from_pretrained(networks / "clip")
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for clip, caption, value in zip(clips, captions, found, strict=False):
        tokens = tokenizer(caption, return_tensors="pt", truncation=True, max_length=32)
        cosines = []
        for frame in clip.numpy():
            pixels = torch.from_numpy((frame / 255 - mean) / deviation).float().permute(2, 0, 1)[None]
            with torch.no_grad():
                out = model(**tokens, pixel_values=pixels)
            cosines.append((out.logits_per_image / model.logit_scale.exp()).item())
        assert value == pytest.approx(100 * np.mean(cosines), abs=1e-3)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


@pytest.mark.parametrize("load", [load_videomae, load_clip])
def test_a_folder_that_is_not_there_or_another_is_refused(networks, tmp_path, load):
    for folder, said in ((tmp_path / "none", "found none; check the path."), (tmp_path, "name another folder.")):
        with pytest.raises(BackboneError, match=r"^Expected ") as caught:
            load(folder)
        assert str(folder) in str(caught.value) and str(caught.value).endswith(said) and "\n" not in str(caught.value)
    other = networks / ("clip" if load is load_videomae else "videomae")
    with pytest.raises(BackboneError, match="name another folder"):
        load(other)


def test_an_i3d_that_is_not_there_or_another_is_refused(networks, tmp_path):
    with pytest.raises(BackboneError, match=r"i3d_torchscript\.pt\) at .*none\.pt, found none"):
        load_i3d(tmp_path / "none.pt")
    (tmp_path / "other.pt").write_bytes(b"other")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "weights.pt")
    for name in ("other.pt", "weights.pt"):
        with pytest.raises(BackboneError, match="found another or a damaged one"):
            load_i3d(tmp_path / name)
