"""Layers of SD1.5's UNets, of AnimateDiff's motion modules and of the VAE that do less than diffusers' own for the same numbers."""

from typing import TypeVar

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)


class OneTextAClip(AttnProcessor2_0):
    """Attention of SD1.5's layers, in which B * F frames may read B texts, and whose output is not divided by 1.

    In cross-attention a clip's frames are one long row of queries; keys and values are made once a clip.
    """

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask=None, *args, **kwargs
    ) -> Tensor:
        if attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read)
        query, key, value = (x.view(len(read), -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2) for x in rows)
        made = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows[0].shape)
        return attn.to_out[1](attn.to_out[0](made))


class WithinAPicture(AttnProcessor2_0):
    """Attention of a VAE, among the places of a picture (N, C, h, w), whose output is not divided by 1."""

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask=None, temb=None
    ) -> Tensor:
        if attention_mask is not None or encoder_hidden_states is not None or hidden_states.ndim != 4:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        places = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        rows = attn.to_q(places), attn.to_k(places), attn.to_v(places)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in rows)
        made = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        made = attn.to_out[1](attn.to_out[0](made))
        return made.transpose(1, 2).reshape(hidden_states.shape) + hidden_states


class Residual(ResnetBlock2D):
    """A residual layer of SD1.5's UNet or VAE (which knows no time), whose output is not divided by 1."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


class MotionLayer(AnimateDiffTransformer3D):
    """A motion module that multiplies its input as one matrix and adds its output without copying it first.

    As diffusers has it, `proj_in` gets, of a single clip, a view that torch cannot see as one matrix; a frozen one then multiplies
    place by place with as many copies of its weight: on a CPU a fifth of an evaluation of SD1.5.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict | None = None,
    ) -> Tensor:
        others = encoder_hidden_states, timestep, class_labels, cross_attention_kwargs
        if any(other is not None for other in others):
            return super().forward(hidden_states, *others[:3], num_frames, cross_attention_kwargs)
        return self.over_time(hidden_states.unflatten(0, (-1, num_frames))).flatten(0, 1)

    def over_time(self, clips: Tensor) -> Tensor:
        """Clips (B, F, C, h, w), each place attending to itself at other times."""
        batch, frames, channels, height, width = clips.shape
        hidden = self.norm(clips.transpose(1, 2)).permute(0, 3, 4, 2, 1)
        hidden = self.proj_in(hidden.reshape(-1, frames, channels).contiguous())
        for block in self.transformer_blocks:
            hidden = block(hidden)
        return clips + self.proj_out(hidden).view(batch, height, width, frames, channels).permute(0, 3, 4, 1, 2)


def without_waste(network: Network) -> Network:
    """The same video or image UNet, or VAE, made to do less for the same numbers.

    It divides nothing by 1; a UNet reads B rows of text in place of B * F, and its motion modules are `MotionLayer`.
    """
    for module in network.modules():
        if type(module) is AnimateDiffTransformer3D:
            module.__class__ = MotionLayer
        elif isinstance(module, Attention) and _is_plain_attention(module):
            module.set_processor(OneTextAClip() if module.group_norm is None else WithinAPicture())
        elif type(module) is ResnetBlock2D and _is_plain_residual(module):
            module.__class__ = Residual
    return network


def _is_plain_attention(attn: Attention) -> bool:
    others = attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k
    of_a_vae = attn.group_norm is not None
    return not any(others) and attn.residual_connection == of_a_vae and attn.rescale_output_factor == 1


def _is_plain_residual(layer: ResnetBlock2D) -> bool:
    others = layer.upsample, layer.downsample, layer.skip_time_act
    norms = ("default",) if layer.time_emb_proj is not None else ("default", "group")  # the second knows no time
    return layer.output_scale_factor == 1 and layer.time_embedding_norm in norms and not any(others)
