"""Prompts of frames, and core's CLIP of a stack, against the stack's own text encoder."""

import math

import pytest
import torch

from tests.avdm2_nodes.conftest import PROMPT

LENGTH = 32  # of the tiny stack's text encoder


@pytest.fixture(scope="module")
def room(comfyui):
    return comfyui.pack("comfy_bridge.prompts")


def embedding(comfyui, clip, text):
    ((tensor, _),) = comfyui.prompt(clip, text)
    return tensor


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# ---- core's CLIP of a stack ----


@pytest.mark.parametrize("text", ["", PROMPT, "a small red square standing still", r"a red \(very red\) circle"])
def test_short_prompts_are_those_of_the_command_line(comfyui, loaded, node_stack, text):
    close(embedding(comfyui, loaded.clip, text), node_stack.encode_text([text.replace("\\", "")]))


@pytest.mark.parametrize("text", ["a (large:1.3) blue circle", "a ((large)) blue (circle moving:0.5) left", "(a red square)"])
def test_weights_are_cores_formula(comfyui, loaded, node_stack, text):
    """A token's difference from the empty prompt, times its weight."""
    (tokens,) = loaded.clip.tokenize(text).values()
    ids, weights = zip(*tokens[0], strict=True)
    plain = node_stack.tokenizer(text.translate(str.maketrans("", "", "():.1350"))).input_ids
    assert list(ids[: len(plain)]) == plain, "brackets and weights are no tokens"
    with torch.no_grad():
        words = node_stack.text_encoder(torch.tensor([ids])).last_hidden_state
    empty = node_stack.encode_text([""])
    expected = torch.where(
        torch.tensor(weights)[None, :, None] == 1, words, empty + (words - empty) * torch.tensor(weights)[None, :, None]
    )
    close(embedding(comfyui, loaded.clip, text), expected)
    assert max(weights) != 1 or min(weights) != 1


@torch.no_grad()
def test_long_prompts_are_encoded_part_by_part(comfyui, loaded, node_stack):
    text = " ".join([PROMPT] * 4)
    tokens = node_stack.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    parts = math.ceil(len(tokens) / (LENGTH - 2))
    assert parts > 1
    tensor = embedding(comfyui, loaded.clip, text)
    assert tensor.shape == (1, parts * LENGTH, 32)
    found = torch.cat(
        [torch.tensor([[token for token, _ in part]]) for (part,) in zip(*loaded.clip.tokenize(text).values(), strict=True)]
    )
    assert [token for token in found.flatten().tolist() if token in set(tokens)] == tokens, "none is lost"
    for i, part in enumerate(found):
        close(tensor[:, i * LENGTH : (i + 1) * LENGTH], node_stack.text_encoder(part[None]).last_hidden_state)


def test_a_text_encoder_on_the_wire_can_be_cloned(comfyui, loaded, node_stack):
    twin = loaded.clip.clone()
    assert twin.patcher is not loaded.clip.patcher and twin.patcher.is_clone(loaded.clip.patcher)
    close(embedding(comfyui, twin, PROMPT), node_stack.encode_text([PROMPT]))


def test_layers_before_the_last_are_cores(comfyui, loaded, node_stack):
    (skipped,) = comfyui.run("CLIPSetLastLayer", clip=loaded.clip, stop_at_clip_layer=-1)
    close(embedding(comfyui, skipped, PROMPT), node_stack.encode_text([PROMPT]))


# ---- prompts of frames ----


def test_lines_are_read_in_any_order_and_empty_ones_left_out(room):
    assert room.parse_prompts("8: a cat: black\n\n 0 :a dog \n4:\n") == {0: "a dog", 4: "", 8: "a cat: black"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "Expected a line such as 0: a cat, found no prompt; write one."),
        (" \n\n", "Expected a line such as 0: a cat, found no prompt; write one."),
        ("0: a\na cat", "Expected a frame, a colon and a prompt in line 2, found 'a cat'; write 8: a cat."),
        ("-1: a", "Expected a frame, a colon and a prompt in line 1, found '-1: a'; write 8: a cat."),
        ("1.5: a", "in line 1, found '1.5: a'"),
        ("0: a\n\n0: b", "Expected each frame once, found 0 again in line 3; remove one."),
        ("9999999: a", "in line 1, found '9999999: a'"),
    ],
)
def test_lines_that_say_nothing_are_refused(room, comfyui, loaded, text, words):
    with pytest.raises(room.PromptError) as told:
        room.parse_prompts(text)
    assert words in str(told.value)
    with pytest.raises(ValueError, match="Expected"):
        comfyui.run("AVDM2PromptTravel", clip=loaded.clip, prompts=text, frames=4)


def test_between_two_prompts_embeddings_are_mixed_and_outside_held(room):
    a, b = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    found = room.blended({2: a, 6: b}, 9)
    assert found.shape == (9, 2, 3)
    assert found[:, 0, 0].tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert room.blended({3: b}, 2)[:, 0, 0].tolist() == [1, 1]
    assert torch.equal(room.blended({0: a, 1: b}, 3), torch.cat([a, b, b]))


def test_a_longer_prompt_s_parts_are_beside_empty_ones(comfyui, loaded, room, node_stack):
    long = " ".join([PROMPT] * 4)
    ((words, _),) = comfyui.run("AVDM2PromptTravel", clip=loaded.clip, prompts=f"0: {PROMPT}\n2: {long}", frames=3)[0]
    parts = embedding(comfyui, loaded.clip, long).shape[1] // LENGTH
    assert words.shape == (3, parts * LENGTH, 32) and parts > 1
    empty = node_stack.encode_text([""])
    close(words[:1], torch.cat([node_stack.encode_text([PROMPT]), *[empty] * (parts - 1)], 1))
    close(words[2:], embedding(comfyui, loaded.clip, long))


def test_one_line_is_the_prompt_itself_for_each_frame(comfyui, loaded, node_stack):
    ((words, extras),) = comfyui.run("AVDM2PromptTravel", clip=loaded.clip, prompts=f"5: {PROMPT}", frames=3)[0]
    close(words, node_stack.encode_text([PROMPT]).expand(3, -1, -1))
    assert extras.keys() == comfyui.prompt(loaded.clip)[0][1].keys()
