"""Packages that only some commands need: imported where they are used, and named with their pip line where they are not installed."""

import importlib
from types import ModuleType


class MissingPackageError(ImportError):
    """A package that is not installed; the message is one sentence with its pip line."""


def needs(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Imports a module of a package, by default that of its first name: `needs("av", "to read and write videos")`.

    MissingPackageError where the package itself is not there; an ImportError from within it goes on as it is.
    """
    package = package or module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingPackageError(
            f"Expected the package {package} {purpose}, found it not installed; install it: pip install {package}"
        ) from error
