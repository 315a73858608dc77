"""Names and shapes of files in their original layouts, written down after the networks that they come from.

Stable Diffusion's UNet, autoencoder and text encoder after CompVis' latent diffusion, motion modules after AnimateDiff; nothing here
comes from the code that is tested.
"""

import math

import torch

SD15 = {"widths": (320, 640, 1280, 1280), "text": 768, "vae": (128, 256, 512, 512)}
TINY = {"widths": (32, 64, 96, 96), "text": 128, "vae": (32, 64, 96, 96), "text_layers": 2, "tokens": 300}


def layer(name, out, into, kernel=(), bias=True):
    return {f"{name}.weight": (out, into, *kernel)} | ({f"{name}.bias": (out,)} if bias else {})


def conv(name, out, into, size=3):
    return layer(name, out, into, (size, size))


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention(name, width, into):
    shapes = {}
    for part, of in (("to_q", width), ("to_k", into), ("to_v", into)):
        shapes |= layer(f"{name}.{part}", width, of, bias=False)
    return shapes | layer(f"{name}.to_out.0", width, width)


def feed_forward(name, width):
    return layer(f"{name}.net.0.proj", 8 * width, width) | layer(f"{name}.net.2", width, 4 * width)


# ---- Stable Diffusion ----


def resblock(name, out, into, time):
    shapes = norm(f"{name}.in_layers.0", into) | conv(f"{name}.in_layers.2", out, into)
    shapes |= (
        layer(f"{name}.emb_layers.1", out, time) | norm(f"{name}.out_layers.0", out) | conv(f"{name}.out_layers.3", out, out)
    )
    return shapes | (conv(f"{name}.skip_connection", out, into, 1) if out != into else {})


def spatial_transformer(name, width, text, linear=False):
    kernel = () if linear else (1, 1)
    block = f"{name}.transformer_blocks.0"
    shapes = norm(f"{name}.norm", width) | layer(f"{name}.proj_in", width, width, kernel)
    shapes |= attention(f"{block}.attn1", width, width) | attention(f"{block}.attn2", width, text)
    for i in (1, 2, 3):
        shapes |= norm(f"{block}.norm{i}", width)
    return shapes | feed_forward(f"{block}.ff", width) | layer(f"{name}.proj_out", width, width, kernel)


def original_unet(widths, text, inputs=4, linear=False):
    """686 tensors at four widths."""
    time, here, skips = 4 * widths[0], widths[0], [widths[0]]
    shapes = layer("time_embed.0", time, here) | layer("time_embed.2", time, time) | conv("input_blocks.0.0", here, inputs)
    last, n = len(widths) - 1, 1
    for level, width in enumerate(widths):
        for _ in range(2):
            shapes |= resblock(f"input_blocks.{n}.0", width, here, time)
            here, n = width, n + 1
            if level != last:
                shapes |= spatial_transformer(f"input_blocks.{n - 1}.1", width, text, linear)
            skips.append(here)
        if level != last:
            shapes |= conv(f"input_blocks.{n}.0.op", here, here)
            skips.append(here)
            n += 1
    shapes |= resblock("middle_block.0", here, here, time) | spatial_transformer("middle_block.1", here, text, linear)
    shapes |= resblock("middle_block.2", here, here, time)
    n = 0
    for level, width in reversed(list(enumerate(widths))):
        for i in range(3):
            shapes |= resblock(f"output_blocks.{n}.0", width, here + skips.pop(), time)
            here, after = width, 1
            if level != last:
                shapes |= spatial_transformer(f"output_blocks.{n}.1", width, text, linear)
                after = 2
            if level and i == 2:
                shapes |= conv(f"output_blocks.{n}.{after}.conv", width, width)
            n += 1
    return shapes | norm("out.0", here) | conv("out.2", 4, here)


def vae_resblock(name, out, into):
    shapes = (
        norm(f"{name}.norm1", into)
        | conv(f"{name}.conv1", out, into)
        | norm(f"{name}.norm2", out)
        | conv(f"{name}.conv2", out, out)
    )
    return shapes | (conv(f"{name}.nin_shortcut", out, into, 1) if out != into else {})


def vae_middle(name, width):
    shapes = vae_resblock(f"{name}.block_1", width, width) | norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.attn_1.{part}", width, width, 1)
    return shapes | vae_resblock(f"{name}.block_2", width, width)


def original_vae(widths):
    """248 tensors at four widths."""
    last, here = len(widths) - 1, widths[0]
    shapes = conv("encoder.conv_in", here, 3)
    for level, width in enumerate(widths):
        for i in range(2):
            shapes |= vae_resblock(f"encoder.down.{level}.block.{i}", width, here)
            here = width
        if level != last:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", here, here)
    shapes |= vae_middle("encoder.mid", here) | norm("encoder.norm_out", here) | conv("encoder.conv_out", 8, here)
    shapes |= conv("decoder.conv_in", here, 4) | vae_middle("decoder.mid", here)
    for level, width in reversed(list(enumerate(widths))):
        for i in range(3):
            shapes |= vae_resblock(f"decoder.up.{level}.block.{i}", width, here)
            here = width
        if level:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", here, here)
    shapes |= norm("decoder.norm_out", here) | conv("decoder.conv_out", 3, here)
    return shapes | conv("quant_conv", 8, 8, 1) | conv("post_quant_conv", 4, 4, 1)


def original_text_encoder(width, layers=12, tokens=49408):
    """197 tensors at 12 layers, one of them position_ids, which is no weight."""
    shapes = {"embeddings.position_ids": (1, 77), "embeddings.token_embedding.weight": (tokens, width)}
    shapes |= {"embeddings.position_embedding.weight": (77, width)}
    for i in range(layers):
        name = f"encoder.layers.{i}"
        for part in ("k", "v", "q", "out"):
            shapes |= layer(f"{name}.self_attn.{part}_proj", width, width)
        shapes |= norm(f"{name}.layer_norm1", width) | norm(f"{name}.layer_norm2", width)
        shapes |= layer(f"{name}.mlp.fc1", 4 * width, width) | layer(f"{name}.mlp.fc2", width, 4 * width)
    return {f"text_model.{name}": shape for name, shape in (shapes | norm("final_layer_norm", width)).items()}


def original_checkpoint(widths, text, vae, text_layers=12, tokens=49408, inputs=4):
    """A whole SD1.5 checkpoint."""
    parts = {
        "model.diffusion_model.": original_unet(widths, text, inputs),
        "first_stage_model.": original_vae(vae),
        "cond_stage_model.transformer.": original_text_encoder(text, text_layers, tokens),
    }
    return {prefix + name: shape for prefix, shapes in parts.items() for name, shape in shapes.items()}


# ---- AnimateDiff ----


def original_motion(widths=SD15["widths"], frames=32, mid=False):
    """560 tensors at four widths, 588 with mid; frames None leaves the position encodings out."""
    modules = [(f"down_blocks.{b}.motion_modules.{i}", w) for b, w in enumerate(widths) for i in range(2)]
    modules += [(f"up_blocks.{b}.motion_modules.{i}", w) for b, w in enumerate(reversed(widths)) for i in range(3)]
    modules += [("mid_block.motion_modules.0", widths[-1])] if mid else []
    shapes = {}
    for module, width in modules:
        name = f"{module}.temporal_transformer"
        block = f"{name}.transformer_blocks.0"
        shapes |= norm(f"{name}.norm", width) | layer(f"{name}.proj_in", width, width) | layer(f"{name}.proj_out", width, width)
        for i in (0, 1):
            shapes |= attention(f"{block}.attention_blocks.{i}", width, width) | norm(f"{block}.norms.{i}", width)
            if frames is not None:
                shapes |= {f"{block}.attention_blocks.{i}.pos_encoder.pe": (1, frames, width)}
        shapes |= feed_forward(f"{block}.ff", width) | norm(f"{block}.ff_norm", width)
    return shapes


# ---- values ----


def sinusoid(frames, width):
    """(1, frames, width): sines at even and cosines at odd places (Vaswani et al., arXiv 1706.03762)."""
    angles = torch.arange(frames)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[None]


def values(shapes, seed=0, dtype=torch.float32):
    """Random weights of the size that training starts from; position encodings are sinusoids."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(".pe"):
            tensors[name] = sinusoid(*shape[1:]).to(dtype)
        elif name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[1])[None]
        else:
            drawn = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
            tensors[name] = (drawn if len(shape) > 1 else 0.1 * drawn + 1).to(dtype)
    return tensors
