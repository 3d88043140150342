"""Which cases a quick run of the suite takes: see ``--cases`` in conftest.py."""

import hashlib
import math
from collections import defaultdict


def left_out(items: list, share: float, commit: str) -> set:
    """What ``--cases`` leaves out of ``items``."""
    found, cases = set(), defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow"):
            found.add(item)
        else:
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_one in cases.values():
        of_one.sort(key=lambda item: hashlib.sha1(f"{commit} {item.nodeid}".encode()).digest())
        found.update(of_one[math.ceil(len(of_one) * share) :])
    return found
