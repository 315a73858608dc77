import pytest

from training.run.command_line import load_config


@pytest.fixture
def load(tmp_path):
    """load("yaml text", *arguments)"""

    def inner(text, *arguments):
        (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
        return load_config(["--config", str(tmp_path / "my.yaml"), *arguments])

    return inner
