"""The settings of a command: one YAML file, overlaid by the command line, checked before anything starts."""

import argparse
import os
import sys
from pathlib import Path

from pydantic_settings import CliSettingsSource, SettingsError

from training.run.config import KEYS, ROOT, ConfigError, DistillConfig, fields, flat, parse_yaml, validated
from training.run.reading import UnreadableError, read_text
from training.run.sections import portable
from training.run.wording import nearest

DEFAULT_FILE = ROOT / "training" / "configs" / "miniature.yaml"


def load_config(argv: list[str] | None = None) -> DistillConfig:
    """The settings of `--config FILE` (default: the miniature's) overlaid by `--section.key value` (default: sys.argv).

    A list is written 999,499 and the absence of a value null. `--help` prints every setting and exits. ConfigError for a file
    that cannot be read, an unknown key (the nearest is suggested) or a wrong value, naming all of them at once.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--section.key VALUE ...]",
        description=DistillConfig.__doc__,
        epilog="The defaults above hold where FILE says nothing.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    file_help = f"YAML file of settings to start from (default: {portable(DEFAULT_FILE)})"
    parser.add_argument("--config", metavar="FILE", type=Path, help=file_help)
    file = _check_arguments(argv)
    try:
        said = CliSettingsSource(
            DistillConfig,
            root_parser=parser,
            cli_parse_args=argv,
            cli_parse_none_str="null",
            cli_avoid_json=True,
            cli_hide_none_type=True,
        )()
    except (argparse.ArgumentError, SettingsError) as error:
        raise ConfigError(f"Command line: {str(error).rstrip('.')}; correct it, or see --help.") from error
    for section, key in _paths():
        if isinstance(path := said.get(section, {}).get(key), str):
            said[section][key] = os.path.abspath(os.path.expanduser(path))
    return validated(_overlay(_read_yaml(file), said), str(file), flat(said))


def _check_arguments(argv: list[str]) -> Path:
    """The `--config` file of a command line, once its keys are known to be valid: argparse would exit without a suggestion."""
    file = DEFAULT_FILE
    if "-h" in argv or "--help" in argv:
        return file
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("--"):
            raise ConfigError(f"Command line: expected --section.key value, found {token!r}; see --help.")
        key, equals, value = token[2:].partition("=")
        if key != "config" and key not in KEYS:
            raise ConfigError(f"Command line: unknown setting --{key}; the nearest is --{nearest(key, KEYS)}, see --help.")
        if not equals:
            value = next(tokens, "")
        if not value or value.startswith("--"):
            raise ConfigError(
                f"Command line: expected a value after --{key}, found {value or 'nothing'}; give one or leave it out."
            )
        if key == "config":
            file = Path(value).expanduser()
    return file


def _read_yaml(file: Path) -> dict:
    try:
        return parse_yaml(read_text(file), str(file))
    except UnreadableError as error:
        raise ConfigError(
            f"Expected a YAML file of settings at {file}, found: {error}; give another after --config."
        ) from error


def _overlay(below: dict, above: dict) -> dict:
    """A new dict: `above` wins, sections are merged."""
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _overlay(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _paths() -> list[tuple[str, str]]:
    return [(section, key) for section, key, field in fields() if "Path" in str(field.annotation)]
