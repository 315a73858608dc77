import copy
from dataclasses import replace

import torch

from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.files.students import image_unet, motion_adapter, predictions, refusal

torch.set_num_threads(1)


def test_whole_student_is_the_unet_without_any_base(path, info, unet, base):
    write_student(path, dict(unet.named_parameters()), info)
    built, checked = student_unet(read_student(path)), student_unet(read_student(path), base)
    assert not built.training and not any(p.requires_grad for p in built.parameters())
    assert all(p.dtype == torch.float32 for p in built.parameters())
    want, *got = predictions(unet, built, checked)
    assert all(torch.equal(want, g) for g in got)


def test_motion_student_is_the_unet_on_its_base(path, info, unet, base, motion_tensors):
    write_student(path, motion_tensors, replace(info, holds="motion"))
    want, got = predictions(unet, student_unet(read_student(path), base))
    assert torch.equal(want, got)


def test_a_half_precision_base_of_the_same_weights_serves(path, info, base):
    half = copy.deepcopy(base).half()
    unet = video_unet(copy.deepcopy(half).float(), motion_adapter()).eval().requires_grad_(False)
    tensors = {name: p for name, p in unet.named_parameters() if "motion_modules" in name}
    write_student(path, tensors, replace(info, holds="motion", base_hash=weights_hash(half)))
    built = student_unet(read_student(path), half)
    want, got = predictions(unet, built)
    assert torch.equal(want, got) and built.dtype == torch.float32 and half.dtype == torch.float16


def test_lora_student_equals_pefts_forward(path, lora_info, adapted, unet, base, motion_tensors, lora_tensors):
    assert {t.ndim for t in lora_tensors.values()} == {2, 4}
    before = weights_hash(base)
    write_student(path, motion_tensors | lora_tensors, lora_info)
    want, plain, got = predictions(adapted, unet, student_unet(read_student(path), base))
    assert (want - plain).abs().max() > 0.01
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert weights_hash(base) == before


def test_position_encodings_in_the_file_are_used(path, info, unet):
    state = unet.state_dict()
    encodings = {name: tensor.half() for name, tensor in state.items() if name.endswith("pos_embed.pe")}
    assert encodings
    write_student(path, state | encodings, info)
    built = student_unet(read_student(path)).state_dict()
    assert all(torch.equal(built[name], tensor.float()) for name, tensor in encodings.items())


def test_base_of_another_architecture(whole, base):
    student = read_student(whole)
    assert "block_out_channels" in refusal(student_unet, student, image_unet((64, 64)))
    assert "num_attention_heads" in refusal(student_unet, student, image_unet(attention_head_dim=8))
    assert "cross_attention_dim" in refusal(student_unet, student, image_unet(cross_attention_dim=32))
    extra = copy.deepcopy(base)
    extra.class_embedding = torch.nn.Linear(2, 2)
    assert "class_embedding.bias" in refusal(student_unet, student, extra)
    # Written once a block, and made for another size of picture, it is the same architecture.
    student_unet(student, image_unet(attention_head_dim=[4, 4], sample_size=16))


def test_partial_student_wants_its_base(path, info, base, motion_tensors):
    write_student(path, motion_tensors, replace(info, holds="motion"))
    student = read_student(path)
    assert "found none" in refusal(student_unet, student)
    other = copy.deepcopy(base)
    other.conv_in.weight.data += 0.01
    message = refusal(student_unet, student, other)
    assert info.base_hash[:12] in message and weights_hash(other)[:12] in message and str(path) in message
