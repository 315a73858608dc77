import torch

from training.cost.launches import Launches
from training.cost.operations import Parts, as_on_a_gpu, operations, phases, update_cost
from training.method.loop import Phase

PARTS = Parts(
    student=10, student_learns=40, teacher=11, encoder=5, encoder_through=15, heads=1, heads_learn=3, score=2, fake_learns=6
)


def test_operations_are_those_of_a_hand_count():
    x, weight = torch.empty(3, 5, device="meta"), torch.empty(7, 5, device="meta")
    image, kernel = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(6, 4, 3, 3, device="meta")
    assert operations(lambda: torch.nn.functional.linear(x, weight)) == 2 * 3 * 5 * 7
    assert operations(lambda: torch.nn.functional.conv2d(image, kernel, padding=1)) == 2 * 2 * 6 * 4 * 9 * 64
    query = torch.empty(1, 2, 16, 8, device="meta")
    attention = operations(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert attention == 2 * (2 * 2 * 16 * 16 * 8)


def test_an_update_is_its_parts_as_often_as_the_settings_say(make_config):
    config = make_config(
        student={"steps": [999, 749, 499, 249]},
        sdm={"frames": 3, "guidance": 2.0, "updates_per_student": 5},
        adm={"updates_per_student": 2, "r1_weight": 0.1},
        warmup={"updates": 1, "guidance": 2.0, "substeps": 3},
    )
    critics = {"fake score": 5 * 3 * 6, "heads": 2 * 3 * (5 + 3)}
    before = {"clips: steps before the one that learns": 1.5 * 10, "student": 40}
    guided, sdm = {"guided teacher": 3 * 2 * 11}, {"SDM": 3 * (1 + 2) * 2}
    assert update_cost(config, PARTS, Phase(matching=False, critics=False, adm=False)) == before | guided
    assert update_cost(config, PARTS, Phase(matching=False, critics=True, adm=False)) == before | guided | critics
    assert update_cost(config, PARTS, Phase(matching=True, critics=True, adm=False)) == before | sdm | critics
    assert update_cost(config, PARTS, Phase(matching=True, critics=True, adm=True)) == before | sdm | {"ADM": 15 + 3} | critics


def test_a_pool_saves_the_encoder_and_pairs_take_it_once_more(make_config):
    adm = {"updates_per_student": 8, "pool": 4, "relativistic": True, "r1_weight": 0.1, "r2_weight": 0.1}
    cost = update_cost(make_config(student={"steps": [499]}, adm=adm), PARTS, Phase(True, True, True))
    assert cost["heads"] == 4 * (5 + 8 * 3) and cost["ADM"] == 15 + 3 + (5 + 1)


def test_the_phases_of_a_run_in_their_order(make_config):
    config = make_config(warmup={"updates": 5, "critics_from": 3}, run={"updates": 7}, adm={"start_update": 2})
    warm, learning, sdm, both = (
        Phase(False, False, False), Phase(False, True, False), Phase(True, True, False), Phase(True, True, True),
    )  # fmt: skip
    assert list(phases(config).items()) == [(warm, 3), (learning, 2), (sdm, 2), (both, 5)]
    late = make_config(warmup={"updates": 5, "critics_from": 9}, run={"updates": 1}, adm={"weight": 0})
    assert list(phases(late).items()) == [(warm, 5), (sdm, 1)]


def test_clips_that_a_loss_does_not_judge_cost_it_nothing(make_config):
    config = make_config(student={"steps": [999, 749, 499, 249]}, sdm={"weight": 0}, adm={"t_max": 300, "r1_weight": 0})
    cost = update_cost(config, PARTS, Phase(True, True, True))  # judged are the steps that go on at 249 and at 0
    assert cost["ADM"] == 0.5 * 18 and cost["heads"] == 0.5 * 2 * (5 + 3) and not {"SDM", "fake score"} & cost.keys()


def test_the_attention_of_a_gpu_ends_with_its_block():
    before, query = torch.nn.functional.scaled_dot_product_attention, torch.empty(1, 2, 16, 8, device="meta")
    with as_on_a_gpu(), Launches() as launches:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert launches.counts == {"_scaled_dot_product_flash_attention": 1}
    assert torch.nn.functional.scaled_dot_product_attention is before
