"""Optional packages, imported when they are needed and without their chatter."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import torch

from soundstage.core.errors import MissingExtra


def optional(module: str, extra: str, *names: str) -> Any:  # noqa: ANN401
    """The module of that name, with these of its names, which some packages import only when asked.

    What it warns of on import (kernels for cards that are not there) is not ours to mend and is not shown; constants
    that it makes on import are real even where a model is being built on the meta device. Raises MissingExtra where the
    package is not installed.
    """
    package = module.partition(".")[0]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
            for name in names:
                getattr(found, name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise MissingExtra(package, extra) from None
    finally:
        logging.disable(before)
    return found
