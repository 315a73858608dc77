from benchmarks.launches import CONFIGS, first_of_each
from training.run.command_line import load_config


def test_every_phase_of_a_run_is_counted_from_its_first_update():
    config = load_config(["--config", str(CONFIGS / "sd15_24gb.yaml")])
    found = first_of_each(config)
    expected = {
        (False, False, False): 0,
        (False, True, False): config.warmup.critics_from,
        (True, True, False): config.warmup.updates,
        (True, True, True): config.warmup.updates + config.adm.start_update,
    }
    assert found == expected
