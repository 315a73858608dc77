import copy
import json
import shutil
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, MotionAdapter, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from avdm2_nodes.diffusion.layers import without_waste
from avdm2_nodes.files.stack import StackError, decode_clips, encode_clips, frames_at_once, load_image_unet, load_stack
from tests.avdm2_nodes.files.original_layouts import TINY, original_checkpoint, original_motion, values


@pytest.fixture
def folder(stack_folder, tmp_path):
    """A copy of the tiny stack, to be damaged."""
    return shutil.copytree(stack_folder, tmp_path / "copy")


def refusal(*args, **options):
    with pytest.raises(StackError) as caught:
        load_stack(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_is_frozen_float32_and_in_evaluation_mode(folder):
    load_image_unet(folder).half().save_pretrained(folder / "unet")
    stack = load_stack(folder)
    for part in (stack.text_encoder, stack.vae, stack.image_unet, stack.motion, stack.teacher):
        assert not part.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())


def test_encoding_and_decoding_are_the_vaes_frame_by_frame(stack):
    frames = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    clips = encode_clips(stack.vae, frames, batch=4)
    assert clips.shape == (2, 4, 3, 8, 8) and clips.dtype == torch.float32
    decoded = decode_clips(stack.vae, clips, batch=4)
    assert decoded.shape == frames.shape and decoded.dtype == torch.uint8
    with torch.no_grad():
        image = frames[1, 2].permute(2, 0, 1)[None] / 127.5 - 1
        latent = stack.vae.encode(image).latents
        torch.testing.assert_close(clips[1, :, 2], 2.0 * latent[0], rtol=1e-4, atol=1e-5)  # 2 is its scaling factor
        back = (stack.vae.decode(clips[1:, :, 2] / 2.0).sample[0] + 1) * 127.5
    assert (decoded[1, 2].permute(2, 0, 1) - back.clamp(0, 255)).abs().max() < 0.51


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made meanwhile held at once."""

    def __enter__(self):
        self.live, self.peak, self._known = 0, 0, set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, storage, size):
        self._known.discard(storage)
        self.live -= size


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["SD1.5's", "TAESD"])
def test_frames_go_through_a_vae_within_a_bound_of_memory(kind, dtype):
    with torch.device("meta"):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        vae = AutoencoderTiny() if kind == "TAESD" else AutoencoderKL(**blocks, **widths)
    torch.nn.Module.to(vae, dtype)
    room = 3 * 2**30
    frames = frames_at_once(vae, 512, 448, room)
    assert 1 < frames <= 32
    for go, side in ((vae.decode, (4, 64, 56)), (vae.encode, (3, 512, 448))):
        with Allocated() as allocated:
            go(torch.empty(frames, *side, dtype=dtype, device="meta"))
        assert allocated.peak < 1.05 * room
        assert frames == 32 or go == vae.encode or allocated.peak > room / 2
    assert frames_at_once(vae, 8192, 8192, room) == 1


def test_frames_go_through_a_vae_in_equal_parts(stack):
    sizes, decode = [], stack.vae.decode
    stack.vae.decode = lambda z: sizes.append(len(z)) or decode(z)
    clips = torch.randn(1, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode_clips(stack.vae, clips, batch=5), decode_clips(stack.vae, clips, batch=4))
    assert sizes == 2 * [4, 4, 4, 4]
    assert [len(part) for part in (decode_clips(stack.vae, clips[:, :, :n], batch=5)[0] for n in (1, 5, 7))] == [1, 5, 7]
    assert sizes[8:] == [1, 5, 4, 3]


def test_sd15_s_vae_divides_by_nothing_and_decodes_and_encodes_the_same():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = AutoencoderKL(**blocks, block_out_channels=(32, 64), layers_per_block=2).eval()
    ours = without_waste(copy.deepcopy(theirs))
    latents, frames = torch.randn(2, 4, 6, 10), torch.rand(2, 3, 12, 20)
    with torch.no_grad(), Names() as plain:
        expected = theirs.decode(latents).sample, theirs.encode(frames).latent_dist.mode()
    with torch.no_grad(), Names() as less:
        found = ours.decode(latents).sample, ours.encode(frames).latent_dist.mode()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "div" in plain.seen and "div" not in less.seen
    assert ours.state_dict().keys() == theirs.state_dict().keys()


class Names(TorchDispatchMode):
    def __enter__(self):
        self.seen = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def test_a_vae_in_half_precision_gives_the_frames_to_a_grey_level_or_two(stack):
    torch.manual_seed(0)
    torch.nn.init.normal_(stack.vae.decoder.layers[-1].weight, std=0.2)  # so that frames are not all of one grey
    clips = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = stack.decode_clips(clips)
    stack.vae.bfloat16()
    half = stack.decode_clips(clips)
    assert half.dtype == torch.uint8 and exact.float().std() > 10
    assert (half.int() - exact.int()).abs().max() <= 3
    assert stack.encode_clips(half).dtype == torch.float32


def test_text_is_padded_cut_and_each_caption_apart(stack):
    long = "a small red circle " * 20
    text = stack.encode_text(["", "a small red circle", long])
    assert text.shape == (3, 32, 32)
    torch.testing.assert_close(stack.encode_text([long])[0], text[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(text[0], text[1])


def test_half_a_character_is_no_prompt(stack):
    with pytest.raises(StackError, match="half of one in 'a"):
        stack.encode_text(["a circle", "a \ud83d circle"])
    assert stack.encode_text(["a \U0001f3a5 circle"]).shape == (1, 32, 32)


def test_without_motion_there_is_an_image_stack(folder):
    shutil.rmtree(folder / "motion_adapter")
    assert load_stack(folder, with_motion=False).motion is None
    assert "motion_adapter" in refusal(folder)


def test_another_motion_adapter_may_be_named(folder, make_motion):
    other = make_motion()
    other.save_pretrained(folder / "other")
    motion = load_stack(folder, motion=folder / "other").motion
    assert all(torch.equal(a, b) for a, b in zip(motion.parameters(), other.parameters(), strict=True))


def test_a_motion_adapter_of_other_widths_is_refused(folder, make_motion):
    make_motion((32, 64, 64)).save_pretrained(folder / "other")
    assert "(32, 64, 64)" in refusal(folder, motion=folder / "other")


def test_an_image_unet_is_found_in_its_folder_and_in_a_stack(stack_folder):
    a, b = load_image_unet(stack_folder), load_image_unet(stack_folder / "unet")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_missing_folder_and_missing_parts_are_named(folder, tmp_path):
    assert str(tmp_path / "gone") in refusal(tmp_path / "gone")
    assert "Expected a model file at" in refusal(tmp_path / "gone.safetensors")
    for part in ("tokenizer", "text_encoder", "vae", "unet", "motion_adapter"):
        shutil.move(folder / part, tmp_path / "away")
        assert str(folder / part) in refusal(folder)
        shutil.move(tmp_path / "away", folder / part)


def test_a_tokenizer_without_its_vocabulary_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"in {tmp_path / 'empty'}, found no vocab.json" in refusal(folder, tokenizer=tmp_path / "empty")
    (folder / "tokenizer" / "merges.txt").unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    assert f"in {folder / 'tokenizer'}, found no merges.txt" in refusal(folder)


@pytest.mark.parametrize("part", ["text_encoder/model", "vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model"])
def test_damaged_weights_are_refused(folder, part):
    path = folder / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path.parent) in refusal(folder)


def test_a_damaged_config_and_a_vae_of_another_kind_are_refused(folder):
    config = folder / "vae" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("AutoencoderTiny", "VQModel"))
    assert "found 'VQModel'" in refusal(folder)
    config.write_text(text[:20])
    assert "config.json" in refusal(folder)


def test_facts_beside_the_parts_are_read_and_may_lack(folder):
    assert load_stack(folder).frames == 16 and load_stack(folder).facts == {}
    (folder / "stack.json").write_text('{"frames": 8, "latent_rgb_factors_bias": [0, 0, 1]}')
    stack = load_stack(folder)
    assert stack.frames == 8 and stack.facts["latent_rgb_factors_bias"] == [0, 0, 1]


@pytest.mark.parametrize("text", ["{", "[]", '{"frames": "many"}'])
def test_damaged_facts_are_refused(folder, text):
    (folder / "stack.json").write_text(text)
    with pytest.raises(
        StackError, match=r"Expected .* (in|at) .*stack\.json, found.*; (correct or remove|check or replace) it"
    ):
        load_stack(folder)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"frames": 0}', "whole number"),
        ('{"frames": -5}', "whole number"),
        ('{"frames": true}', "whole number"),
        ('{"frames": 1000000000}', "whole number"),
        ('{"frames": 33}', "32 position encodings, found 33"),
        ('{"latent_rgb_factors": "red"}', "three numbers a channel"),
        ('{"latent_rgb_factors": [[1, 2]]}', "three numbers a channel"),
        ('{"latent_rgb_factors": [[1, 2, NaN]]}', "three numbers a channel"),
        ('{"latent_rgb_factors_bias": [1, 2, "3"]}', "three numbers a channel"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_facts_that_cannot_be_are_refused(folder, text, said):
    (folder / "stack.json").write_text(text)
    assert said in refusal(folder)


# ---- parts that were not made for one another ----


def test_parts_of_unlike_models_are_refused_before_anything_runs(folder, make_image_unet, tmp_path):
    def other_unet(**settings):
        config = {name: value for name, value in make_image_unet().config.items() if not name.startswith("_")}
        UNet2DConditionModel.from_config({**config, **settings}).save_pretrained(folder / "unet")
        return refusal(folder)

    assert "in_channels of the UNet" in (message := other_unet(in_channels=9)) and "found 9 (an inpainting model)" in message
    assert "out_channels of the UNet" in other_unet(out_channels=8)
    assert "a text encoder of the width that the UNet reads" in (message := other_unet(cross_attention_dim=64))
    assert "to be 64, found 32" in message
    assert "class_embed_type" in other_unet(class_embed_type="timestep")
    make_image_unet().save_pretrained(folder / "unet")
    load_stack(folder)
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, latent_channels=8
    ).save_pretrained(folder / "vae")  # fmt: skip
    assert "to be 8, found 4, and the VAE's latents have 8" in refusal(folder)


def test_a_tokenizer_of_longer_prompts_or_more_tokens_is_refused(folder):
    settings = folder / "tokenizer" / "tokenizer_config.json"
    said = json.loads(settings.read_text())
    for length in (33, 10**30, [32], "thirty-two"):
        settings.write_text(json.dumps(said | {"model_max_length": length}))
        assert "prompts of 32), found one of" in refusal(folder)


def test_motion_modules_of_other_layers_are_refused(folder):
    MotionAdapter(
        block_out_channels=(32, 32, 64), motion_layers_per_block=2, motion_num_attention_heads=2, motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ).save_pretrained(folder / "motion_adapter")  # fmt: skip
    assert "[1, 1, 1] layers a block, found one for [2, 2, 2]" in refusal(folder)


@pytest.mark.parametrize("other, class_name", [("unet", "UNet2DConditionModel"), ("vae", "AutoencoderTiny")])
def test_another_models_folder_in_a_parts_place_is_named(folder, other, class_name):
    assert f"Expected a MotionAdapter in {folder / other}, found a {class_name}" in refusal(folder, motion=folder / other)


def test_weights_that_are_not_all_there(folder):
    file = folder / "motion_adapter" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    gone = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, {"format": "pt"})
    assert f"found none for 1 of its tensors (such as {gone})" in refusal(folder)


@pytest.mark.parametrize("part", ["text_encoder/model", "vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model"])
def test_weights_that_are_no_numbers(folder, part):
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    assert "NaN or infinite numbers in 1 of its tensors" in refusal(folder)


def test_variants_and_pickles_are_told_with_what_to_do(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    message = refusal(folder)
    assert (
        "found the variant fp16 alone" in message
        and "rename diffusion_pytorch_model.fp16.safetensors to diffusion_pytorch_model.safetensors" in message
    )
    half.rename(file)
    load_stack(folder)
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    assert "found pickles alone (diffusion_pytorch_model.bin)" in refusal(folder)


def test_settings_beyond_every_model_are_refused_before_it_is_made(folder):
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 10**6}))
    assert "layers_per_block with a number that is too large" in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_config_that_is_no_object(folder, text):
    (folder / "vae" / "config.json").write_text(text)
    assert "settings by name" in refusal(folder)


def test_paths_that_no_file_can_have(folder, tmp_path):
    for path in (tmp_path / ("n" * 300), tmp_path / ("n" * 300 + ".safetensors"), Path(f"{tmp_path}/a\0b")):
        refusal(path)
        refusal(folder, motion=path)


# ---- files as people have them ----


@pytest.fixture(scope="module")
def files(tmp_path_factory, stack_folder):
    """A checkpoint in one file and motion modules, of SD1.5's layout at a small width; a folder with a vocabulary."""
    folder = tmp_path_factory.mktemp("files")
    save_file(values(original_checkpoint(**TINY)), folder / "model.safetensors")
    save_file(values(original_motion(TINY["widths"])), folder / "motion.safetensors")
    save_file({"lora_unet_mid_block.lora_down.weight": torch.ones(2, 2)}, folder / "lora.safetensors")
    return folder


def test_a_stack_of_files(files, monkeypatch):
    monkeypatch.setattr("avdm2_nodes.files.stack.clip_tokenizer", lambda folder: ("tokenizer of", folder))
    stack = load_stack(files / "model.safetensors", files / "motion.safetensors", tokenizer=files)
    assert stack.tokenizer == ("tokenizer of", files) and stack.frames == 16 and stack.pixels == 8
    text = torch.randn(2, 5, TINY["text"], generator=torch.Generator().manual_seed(0))
    clip = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    assert stack.teacher(clip, 10, text).sample.isfinite().all()
    assert torch.equal(load_image_unet(files / "model.safetensors").conv_in.weight, stack.image_unet.conv_in.weight)


def test_a_checkpoint_in_one_file_needs_motion_and_a_vocabulary(files, monkeypatch):
    assert "neither a folder with vocab.json" in refusal(files / "model.safetensors") or find_spec("open_clip")
    monkeypatch.setattr("avdm2_nodes.files.stack.clip_tokenizer", lambda folder: None)
    assert "found none named" in refusal(files / "model.safetensors")


def test_other_files_are_told_as_what_they_are(files, stack_folder):
    assert "motion module" in refusal(files / "motion.safetensors", with_motion=False)
    assert "LoRA" in refusal(stack_folder, files / "lora.safetensors")
    assert "widths" in refusal(stack_folder, files / "motion.safetensors")
