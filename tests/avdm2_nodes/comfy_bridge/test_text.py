import math

import pytest
import torch

from tests.avdm2_nodes.conftest import PROMPT

LENGTH = 32  # of the tiny stack's text encoder


def embedding(comfyui, clip, text):
    ((tensor, extras),) = comfyui.prompt(clip, text)
    assert extras["pooled_output"] is None
    return tensor


@pytest.mark.parametrize("text", ["", PROMPT, "a small red square standing still", r"a red \(very red\) circle"])
def test_short_prompts_are_those_of_the_command_line(comfyui, loaded, node_stack, text):
    expected = node_stack.encode_text([text.replace("\\", "")])
    assert torch.equal(embedding(comfyui, loaded.clip, text), expected)


@pytest.mark.parametrize("text", ["a (large:1.3) blue circle", "a ((large)) blue (circle moving:0.5) left", "(a red square)"])
def test_weights_are_cores_own(comfyui, loaded, node_stack, text):
    from comfy.sd1_clip import ClipTokenWeightEncoder

    tokenizer = node_stack.tokenizer

    class Core(ClipTokenWeightEncoder):
        """Core's formula over the stack's text encoder."""

        def __init__(self):
            kinds = {"start": "bos", "end": "eos", "pad": "pad"}
            self.special_tokens = {name: getattr(tokenizer, f"{kind}_token_id") for name, kind in kinds.items()}

        @torch.no_grad()
        def encode(self, tokens):
            return node_stack.text_encoder(torch.tensor(tokens)).last_hidden_state, None

    tokens = loaded.clip.tokenize(text)["stack"]
    plain = tokenizer(text.translate(str.maketrans("", "", "():.1350"))).input_ids
    assert [token for token, _ in tokens[0]][: len(plain)] == plain, "brackets and weights are no tokens"
    expected, _ = Core().encode_token_weights(tokens)
    weighed = embedding(comfyui, loaded.clip, text)
    torch.testing.assert_close(weighed, expected, rtol=0, atol=1e-5)
    assert (weighed - node_stack.encode_text([tokenizer.decode(plain[1:-1])])).abs().max() > 0.01


@torch.no_grad()
def test_long_prompts_are_encoded_part_by_part(comfyui, loaded, node_stack):
    text = " ".join([PROMPT] * 4)
    tokens = node_stack.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    parts = math.ceil(len(tokens) / (LENGTH - 2))
    assert parts > 1
    tensor = embedding(comfyui, loaded.clip, text)
    assert tensor.shape == (1, parts * LENGTH, 32)
    start, end = node_stack.tokenizer.bos_token_id, node_stack.tokenizer.eos_token_id
    for i in range(parts - 1):
        part = torch.tensor([[start, *tokens[i * (LENGTH - 2) : (i + 1) * (LENGTH - 2)], end]])
        expected = node_stack.text_encoder(part).last_hidden_state
        assert torch.equal(tensor[:, i * LENGTH : (i + 1) * LENGTH], expected)
    rest = node_stack.tokenizer.decode(tokens[(parts - 1) * (LENGTH - 2) :])
    assert torch.equal(tensor[:, -LENGTH:], node_stack.encode_text([rest]))


def test_a_text_encoder_on_the_wire_can_be_cloned(comfyui, loaded, node_stack):
    twin = loaded.clip.clone()
    assert twin.patcher is not loaded.clip.patcher and twin.patcher.is_clone(loaded.clip.patcher)
    assert torch.equal(embedding(comfyui, twin, PROMPT), node_stack.encode_text([PROMPT]))


def test_embeddings_of_two_lengths_are_repeated_to_one(comfyui):
    text = comfyui.pack("comfy_bridge.text")
    a, b = torch.randn(1, 6, 8), torch.randn(1, 4, 8)
    long_a, long_b = text.of_one_length(a, b)
    assert torch.equal(long_a, torch.cat([a, a], 1)) and torch.equal(long_b, torch.cat([b, b, b], 1))
    query = torch.randn(1, 5, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attention(query, a, a), attention(query, long_a, long_a))


def conditionings(comfyui, plain):
    """Conditionings that no sampler of ours can follow, as core's nodes make them, and what each is called."""
    import comfy.controlnet
    import comfy.hooks
    import node_helpers

    mask = torch.ones(1, 32, 32)
    area = {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}
    (combined,) = comfyui.run("ConditioningCombine", conditioning_1=plain, conditioning_2=plain)
    (with_area,) = comfyui.run("ConditioningSetArea", conditioning=plain, **area)
    (with_mask,) = comfyui.run("ConditioningSetMask", conditioning=plain, mask=mask, strength=1.0, set_cond_area="default")
    (late,) = comfyui.run("ConditioningSetTimestepRange", conditioning=plain, start=0.0, end=0.5)
    (early,) = comfyui.run("ConditioningSetTimestepRange", conditioning=plain, start=0.2, end=1.0)
    control = node_helpers.conditioning_set_values(plain, {"control": comfy.controlnet.ControlBase()})
    hooked = node_helpers.conditioning_set_values(plain, {"hooks": comfy.hooks.HookGroup()})
    return {
        "found 2; join them with Conditioning": combined,
        "found an area": with_area,
        "found a mask": with_mask,
        "found a range of timesteps": late,
        "found a range of timesteps on it": early,
        "found a ControlNet": control,
        "found hooks": hooked,
        "of width 32 at positive, found 48": [[torch.zeros(1, LENGTH, 48), {}]],
        "one prompt for the whole clip at positive, found 3": [[torch.zeros(3, LENGTH, 32), {}]],
    }


def test_what_no_sampler_can_follow_is_refused_before_work(comfyui, loaded, student, evaluations):
    plain = comfyui.prompt(loaded.clip)
    options = {"latent": comfyui.empty(), "seed": 0, "steps": 4, "denoise": 1.0}
    for words, conditioning in conditionings(comfyui, plain).items():
        with pytest.raises(ValueError, match=f"^Expected .*{words}") as refused:
            comfyui.run("AVDM2StudentSampler", student=student, positive=conditioning, **options)
        assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
        with pytest.raises(ValueError, match=words.replace("positive", "negative")):
            comfyui.run(
                "AVDM2TeacherSampler", teacher=loaded.teacher, positive=plain, negative=conditioning, cfg=3.0, **options
            )
    assert not evaluations
    (whole,) = comfyui.run("ConditioningSetTimestepRange", conditioning=plain, start=0.0, end=1.0)
    comfyui.run("AVDM2StudentSampler", student=student, positive=whole, **options)  # all of the range is no range
