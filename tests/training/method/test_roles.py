import copy

import pytest
import torch

from avdm2_nodes.diffusion.unets import encoder_features, image_predictor, video_predictor
from training.method.adapters import LoraLayer
from training.method.loop import Made
from training.method.masters import gather, refresh
from training.method.roles import build_roles

MODES = [("motion", False), ("motion", True), ("motion+lora", False), ("motion+lora", True), ("all", False)]


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 4, 8, 8, generator=generator),
        torch.tensor([700, 30]),
        torch.randn(2, 32, 32, generator=generator),
    )


@torch.no_grad()
def outputs(roles, inputs):
    """What every role says of the same noisy clips or frames."""
    x, t, text = inputs
    frames = x[:, :, 0]
    features = {f"feature {i}": f for i, f in enumerate(roles.encoder(x, t, text))}
    return features | {
        "teacher": roles.teacher(x, t, text),
        "student": roles.student(x, t, text),
        "real": roles.real_score(frames, t, text),
        "fake": roles.fake_score(frames, t, text),
    }


def disturb(roles):
    """Moves all that is trained, LoRA's zeros too, in a way that the names alone fix."""
    with torch.no_grad():
        for weights in (roles.student_weights, roles.fake_weights):
            for name in sorted(weights):
                noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(len(name)))
                weights[name].add_(0.05 * noise)


def frozen(roles):
    trained = {id(p) for p in (*roles.student_weights.values(), *roles.fake_weights.values())}
    return [p for module in roles.modules for p in module.parameters() if id(p) not in trained]


@pytest.mark.parametrize(("train", "share_base"), MODES)
def test_at_the_start_the_student_is_the_teacher_and_the_fake_score_the_real_one(stack, inputs, train, share_base):
    x, t, text = inputs
    said = outputs(build_roles(stack, train=train, share_base=share_base, lora_rank=2), inputs)
    with torch.no_grad():
        torch.testing.assert_close(said["teacher"], video_predictor(stack.teacher)(x, t, text))
        torch.testing.assert_close(said["real"], image_predictor(stack.image_unet)(x[:, :, 0], t, text))
        for i, feature in enumerate(encoder_features(stack.teacher, x, t, text)):
            torch.testing.assert_close(said[f"feature {i}"], feature)
    torch.testing.assert_close(said["student"], said["teacher"])
    torch.testing.assert_close(said["fake"], said["real"])


@pytest.mark.parametrize(("train", "share_base"), MODES)
def test_training_moves_student_and_fake_score_and_nothing_else(stack, inputs, train, share_base):
    roles = build_roles(stack, train=train, share_base=share_base, lora_rank=2)
    before = outputs(roles, inputs)
    disturb(roles)
    after = outputs(roles, inputs)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"student", "fake"}


def test_what_is_trained(stack):
    names = {mode: build_roles(stack, train=mode, lora_rank=2) for mode in ("all", "motion", "motion+lora")}
    everything = dict(stack.teacher.named_parameters()).keys()
    motion = {name for name in everything if "motion_modules" in name}
    assert names["all"].student_weights.keys() == everything
    assert names["all"].fake_weights.keys() == dict(stack.image_unet.named_parameters()).keys()
    assert names["motion"].student_weights.keys() == motion
    lora = names["motion+lora"].student_weights.keys() - motion
    assert lora == names["motion"].fake_weights.keys() == names["motion+lora"].fake_weights.keys()
    for name in lora:
        layer, kind = name.rsplit(".lora_", 1)
        assert kind in ("A.weight", "B.weight") and f"{layer}.weight" in everything and "motion" not in layer
    for kind in ("attn1.to_q", "attn2.to_out.0", "ff.net.2", "resnets.0.conv1", "time_emb_proj", "downsamplers.0.conv"):
        assert any(kind in name for name in lora), kind


@pytest.mark.parametrize(("train", "share_base"), MODES)
def test_only_what_is_trained_wants_a_gradient(stack, train, share_base):
    roles = build_roles(stack, train=train, share_base=share_base, lora_rank=2)
    assert not any(p.requires_grad for p in frozen(roles))
    assert all(p.requires_grad for p in (*roles.student_weights.values(), *roles.fake_weights.values()))
    assert not {id(p) for p in roles.student_weights.values()} & {id(p) for p in roles.fake_weights.values()}


def gradient(roles, inputs):
    """The gradient of a loss that looks through student and encoder, by name; with the fake score's own loss."""
    x, t, text = inputs
    x0 = x - roles.student(x, t, text)
    features = roles.encoder(x0, t, text)
    (sum(f.float().square().mean() for f in features) + x0.square().mean()).backward()
    roles.fake_score(x[:, :, 0], t, text).square().mean().backward()
    gather(roles.student_weights, roles.student_copies)
    gather(roles.fake_weights, roles.fake_copies)
    pairs = (("student", roles.student_weights), ("fake", roles.fake_weights))
    return {f"{role} {name}": p.grad for role, weights in pairs for name, p in weights.items() if p.grad is not None}


def distance(gradients, exact, role):
    """Of the whole gradient of a role, relative."""
    names = [name for name in exact if name.startswith(role)]
    a, b = (torch.cat([g[name].flatten() for name in names]) for g in (gradients, exact))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("train", "share_base"), MODES)
def test_in_half_precision_errors_are_those_of_autocast(stack, inputs, train, share_base, checkpointing):
    """All networks are in bf16, norms and positions too; autocast keeps float32 weights and casts them for products only."""
    found = {}
    for kind in ("exact", "autocast", "half"):
        roles = build_roles(
            stack, train=train, share_base=share_base, lora_rank=2, gradient_checkpointing=checkpointing, half=kind == "half"
        )
        disturb(roles)
        refresh(roles.student_weights, roles.student_copies)
        refresh(roles.fake_weights, roles.fake_copies)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            found[kind] = gradient(roles, inputs)
    assert found["half"].keys() == found["exact"].keys() and len(found["exact"]) > 20
    assert all(g.dtype == torch.float32 for g in found["half"].values())
    for role in ("student", "fake"):
        assert 0 < distance(found["half"], found["exact"], role) < 1.3 * distance(found["autocast"], found["exact"], role)
    tensors = [x for module in roles.modules for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
    assert len(tensors) > 100 and all(x.dtype == torch.bfloat16 for x in tensors)
    masters = (*roles.student_weights.values(), *roles.fake_weights.values(), *roles.student_positions.values())
    assert all(x.dtype == torch.float32 for x in (*masters, *stack.image_unet.parameters()))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("train", "share_base"), MODES)
def test_all_networks_go_to_the_device_and_the_stack_stays(stack, train, share_base, half):
    there = torch.device("meta")  # every machine has this one beside its CPU
    roles = build_roles(stack, train=train, share_base=share_base, lora_rank=2, half=half, device=there)
    tensors = [t for module in roles.modules for t in (*module.parameters(), *module.buffers())]
    assert len(tensors) > 100 and all(t.device == there for t in tensors)
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in stack.image_unet.parameters())


def test_the_stack_itself_stays_as_it_is(stack):
    before = {name: p.clone() for name, p in stack.image_unet.named_parameters()}
    roles = build_roles(stack, train="motion+lora", share_base=True, lora_rank=2, gradient_checkpointing=True)
    disturb(roles)
    assert not any(isinstance(m, LoraLayer) for m in stack.image_unet.modules())
    assert all("forward" not in vars(m) for m in stack.image_unet.modules())
    assert all(torch.equal(p, before[name]) for name, p in stack.image_unet.named_parameters())


def test_a_shared_base_is_there_once(stack):
    def size(roles):
        return sum(p.numel() for p in {id(p): p for m in roles.modules for p in m.parameters()}.values())

    shared = build_roles(stack, train="motion+lora", share_base=True, lora_rank=2)
    copies = build_roles(stack, train="motion+lora", share_base=False, lora_rank=2)
    spatial = sum(p.numel() for p in stack.image_unet.parameters())
    assert size(copies) - size(shared) == 3 * spatial


@pytest.mark.parametrize("own_style", [True, False])
@pytest.mark.parametrize("train", ["motion", "motion+lora"])
def test_copies_and_a_shared_base_give_the_same_numbers(
    stack, inputs, make_config, make_distillation, make_image_unet, random_clips, train, own_style
):
    torch.manual_seed(1)
    score_unet = None if own_style else make_image_unet().eval().requires_grad_(False)
    runs, figures = [], []
    for share_base in (False, True):
        config = make_config(model={"train": train, "share_base": share_base}, student={"steps": [999, 499]})
        run = make_distillation(stack, config, score_unet)
        figures.append([run.update(step, random_clips) for step in range(3)])
        runs.append(run)
    copies, shared = runs
    for a, b in zip(*figures, strict=True):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6) for key in a)
    for part in ("student", "fake", "critic"):
        mine, theirs = getattr(copies, part).weights, getattr(shared, part).weights
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)
    a, b = outputs(copies.roles, inputs), outputs(shared.roles, inputs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(b["student"], b["teacher"], atol=1e-4) and not torch.allclose(b["fake"], b["real"], atol=1e-4)


def as_made(clips, text):
    """Any clips as if the student had made them in its last step."""
    ends = torch.zeros(len(clips)).long()  # the chain's last step: judged at all noise
    return Made(range(len(clips)), text, clips, clips, torch.full((len(clips),), 249), ends, ends, clips)


def student_gradient(run, clips):
    """The gradient of the whole student loss, as `update` computes it."""
    real, text = clips.batch([0, 1])
    made, clips = run.make_clips(real, text, range(2))
    (run.sdm.student_loss(made, clips) + run.adm.student_loss(made, clips)).backward()
    return {name: p.grad.clone() for name, p in run.roles.student_weights.items()}


@pytest.mark.parametrize(("train", "share_base"), [("all", False), ("motion+lora", True), ("motion", True)])
def test_gradient_checkpointing_changes_no_gradient(stack, make_config, make_distillation, random_clips, train, share_base):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = {"train": train, "share_base": share_base, "gradient_checkpointing": checkpointing}
        run = make_distillation(stack, make_config(model=model, student={"steps": [499]}))
        disturb(run.roles)
        count = []
        for kind in ("conv1", "to_q"):
            layers = [m for n, m in run.roles.modules[1].named_modules() if n.endswith(kind)]
            layers[0].register_forward_hook(lambda *_, kind=kind, count=count: count.append(kind))
        gradients.append(student_gradient(run, random_clips))
        calls.append(count)
        fake = run.sdm.fake_loss(as_made(random_clips.clips[:2], random_clips.texts[:2]), 0)
        fake.backward()
        gradients[-1] |= {f"fake {name}": p.grad.clone() for name, p in run.roles.fake_weights.items()}
    plain, checkpointed = gradients
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)
    assert sum(g.abs().max() > 0 for g in plain.values()) > 0.9 * len(plain)
    assert all(calls[1].count(kind) > calls[0].count(kind) for kind in ("conv1", "to_q"))  # layers ran again


@pytest.mark.parametrize(("train", "share_base"), [("all", False), ("motion+lora", True)])
def test_the_gradient_flows_through_the_frozen_encoder_and_moves_nothing_frozen(
    stack, make_config, make_distillation, random_clips, train, share_base
):
    config = make_config(model={"train": train, "share_base": share_base}, student={"steps": [499]}, sdm={"weight": 0})
    run = make_distillation(stack, config)
    before = [p.detach().clone() for p in frozen(run.roles)]
    weights = {name: p.detach().clone() for name, p in run.roles.student_weights.items()}
    for step in range(2):
        assert run.update(step, random_clips)["student_norm"] > 0
    assert all(torch.equal(a, b) for a, b in zip(frozen(run.roles), before, strict=True))
    assert all(p.grad is None for p in frozen(run.roles))
    moved = [name for name, p in run.roles.student_weights.items() if not torch.equal(p, weights[name])]
    assert len(moved) > 0.9 * len(weights)


def test_the_gradient_through_the_encoder_is_that_of_finite_differences(stack, make_config, make_distillation, random_clips):
    run = make_distillation(stack, make_config())
    x, text = random_clips.batch([0, 1])
    clips, made = x.clone().requires_grad_(True), as_made(x, text)
    (gradient,) = torch.autograd.grad(run.adm.student_loss(made, clips), clips)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        rise = run.adm.student_loss(made, x + 0.1 * direction) - run.adm.student_loss(made, x - 0.1 * direction)
    assert (rise / 0.2).item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_adapters_are_drawn_from_the_seed(stack):
    def lora(seed):
        roles = build_roles(stack, train="motion+lora", lora_rank=2, seed=seed)
        return {n: p for weights in (roles.student_weights, roles.fake_weights) for n, p in weights.items() if "lora_A" in n}

    torch.manual_seed(1)
    first = copy.deepcopy(lora(0))
    torch.manual_seed(2)
    again, other = lora(0), lora(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_shared_base_with_all_weights_trained_is_refused(stack):
    with pytest.raises(ValueError, match="found train: all"):
        build_roles(stack, train="all", share_base=True)
