import torch
from diffusers import AutoencoderTiny, UNetMotionModel

from avdm2_nodes.diffusion.layers import without_waste
from benchmarks.cost import decoder_operations, sd15_table, unet_operations

WIDTHS, TEXT = (8, 16), 12
CONFIG = {
    "sample_size": 8, "block_out_channels": WIDTHS, "layers_per_block": 1, "cross_attention_dim": TEXT, "norm_num_groups": 4,
    "num_attention_heads": 2, "motion_num_attention_heads": 2, "use_motion_mid_block": False, "motion_max_seq_length": 32,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}  # fmt: skip


def by_hand(batch, frames, side, tokens):
    """Operations of that UNet, from its modules' shapes: what each convolution, linear layer and attention multiplies."""
    with torch.device("meta"):
        unet = without_waste(UNetMotionModel(**CONFIG)).eval()
    total = 0

    def convolution(module, inputs, out):
        nonlocal total
        total += 2 * out.numel() * module.weight[0].numel()

    def linear(module, inputs, kwargs, out):
        nonlocal total
        rows = (inputs[0] if inputs else kwargs["input"]).numel() // module.in_features
        total += 2 * rows * module.in_features * module.out_features

    def attention(module, inputs, kwargs, out):
        nonlocal total
        rows, queries, width = inputs[0].shape
        text = kwargs.get("encoder_hidden_states")
        # Frames that share a text are one long row of queries; per query and key a product of the width, twice.
        total += 2 * 2 * rows * queries * (queries if text is None else text.shape[1]) * width

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear, with_kwargs=True)
        elif type(module).__name__ == "Attention":
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.device("meta"), torch.no_grad():
        unet(
            torch.empty(batch, 4, frames, side, side),
            torch.empty(batch, dtype=torch.long),
            torch.empty(batch, tokens, TEXT),
        )
    return total


def test_a_unet_is_counted_as_by_hand():
    for clip, tokens in (((1, 4, 3, 8, 8), 7), ((2, 4, 5, 8, 8), 9)):
        expected = by_hand(clip[0], clip[2], clip[3], tokens)
        assert unet_operations(CONFIG, clip, tokens) == expected
        assert unet_operations(CONFIG, clip, tokens, classifier_free=True) == by_hand(2 * clip[0], clip[2], clip[3], tokens)


def test_a_decoder_is_counted_as_by_hand():
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    total = 0
    for name, module in vae.decoder.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            layer = int(name.split(".")[1])
            side = 6 * 2 ** sum(isinstance(vae.decoder.layers[i], torch.nn.Upsample) for i in range(layer))
            total += 2 * 3 * side**2 * module.weight.numel()
    assert decoder_operations(vae, (3, 4, 6, 6)) == total


def test_full_size_is_what_others_count():
    """803 GFLOP are what SD1.5's UNet is commonly said to take at 512x512, attention included; its VAE's decoder about 2,500."""
    table = sd15_table()
    assert abs(table["image UNet, an evaluation of every frame"] / 16 - 0.803) < 0.01
    assert abs(table["VAE, decoding"] / 16 - 2.5) < 0.05
    assert table["teacher, 25 guided steps"] / table["student, 4 evaluations"] == 12.5
    assert table["student's clip, VAE"] == table["student, 4 evaluations"] + table["VAE, decoding"]
