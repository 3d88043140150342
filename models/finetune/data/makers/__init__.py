"""Makers of sets: each file here has one function or more named ``make_..._dataset``, found by its name.

A maker takes keyword arguments: ``path`` (instead of its set's Hub id), ``split`` and ``streaming``. It gives a Source or
a Stream, and raises NoSplit for a split that its set has not.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable

from m3kernels.models.finetune.config import FinetuneError


def all_makers() -> dict[str, Callable]:
    """Every maker by its name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        names = vars(importlib.import_module(f"{__name__}.{module.name}"))
        found |= {
            name: value for name, value in names.items() if name.startswith("make_") and name.endswith("_dataset")
        }
    return found


def find_maker(name: str) -> Callable:
    """A maker by its name, or the short one: ``make_cord_v2_dataset``, ``cord_v2``, ``cord-v2``.

    Raises:
        FinetuneError: there is none of this name; the message has the nearest.
    """
    makers = all_makers()
    short = name.removeprefix("make_").removesuffix("_dataset").replace("-", "_")
    if f"make_{short}_dataset" in makers:
        return makers[f"make_{short}_dataset"]
    near = difflib.get_close_matches(f"make_{short}_dataset", makers, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise FinetuneError(f"there is no maker {name!r}.{hint} Makers: {', '.join(sorted(makers))}")
