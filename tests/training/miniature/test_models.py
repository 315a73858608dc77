import json

import torch
from diffusers import UNetMotionModel
from transformers import CLIPTokenizer

from avdm2_nodes.diffusion.unets import image_predictor, video_predictor, video_unet
from training.miniature.models import TOKENS, new_image_unet, new_motion_adapter, new_text_encoder, write_tokenizer
from training.world import scenes

CAPTIONS = [content.caption for content in scenes.all_contents()]


def test_every_caption_fits_and_is_its_own_text(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CAPTIONS)
    again = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = [tuple(tokenizer(caption).input_ids) for caption in CAPTIONS]
    assert len(set(ids)) == len(CAPTIONS) and max(map(len, ids)) <= TOKENS
    for caption, tokens in list(zip(CAPTIONS, ids, strict=True))[::97]:
        assert tuple(again(caption).input_ids) == tokens == tuple(again(caption.upper()).input_ids)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == caption
    strange = tokenizer("a blürry zebra").input_ids
    assert tokenizer.decode(strange, skip_special_tokens=True).strip() == "a blürry zebra"
    assert len(tokenizer) == len(json.loads((tmp_path / "tokenizer" / "vocab.json").read_text()))


def test_the_untrained_stack_fits_together_and_motion_adds_nothing_yet(tmp_path):
    torch.manual_seed(0)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CAPTIONS)
    unet, motion = new_image_unet().eval(), new_motion_adapter().eval()
    tokens = tokenizer(CAPTIONS[:1], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        text = new_text_encoder(tokenizer).eval()(tokens.input_ids).last_hidden_state
        video = video_unet(unet, motion)
        x, t = torch.randn(1, 4, 8, 8, 8), torch.tensor([500])
        eps = video_predictor(video)(x, t, text)
        torch.testing.assert_close(eps[:, :, 3], image_predictor(unet)(x[:, :, 3], t, text), rtol=1e-5, atol=2e-6)
    assert isinstance(video, UNetMotionModel) and video.config.motion_max_seq_length == 32
    assert not video.config.use_motion_mid_block
