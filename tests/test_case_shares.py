"""``--cases``: which of the suite's cases a quick run takes."""

from types import SimpleNamespace

import pytest
from case_shares import left_out


class Item(SimpleNamespace):
    __hash__ = object.__hash__


def items(**cases: int) -> list:
    marker = lambda name: None
    return [Item(nodeid=f"{name}[{i}]", get_closest_marker=marker) for name, many in cases.items() for i in range(many)]


def kept(given: list, share: float, commit: str) -> list[str]:
    out = left_out(given, share, commit)
    return [item.nodeid for item in given if item not in out]


@pytest.mark.parametrize(("share", "sizes"), [(0.25, (1, 1, 25)), (0.5, (1, 2, 50)), (0.01, (1, 1, 1))])
def test_every_test_keeps_a_share(share, sizes):
    found = kept(items(one=1, few=3, many=100), share, "abc")
    assert tuple(sum(node.startswith(name) for node in found) for name in ("one", "few", "many")) == sizes


def test_cases_follow_from_the_commit():
    given = items(many=100)
    runs = [kept(given, 0.25, commit) for commit in ("abc", "abc", "abd")]
    assert runs[0] == runs[1] and runs[0] != runs[2]
    seen = {node for commit in range(60) for node in kept(given, 0.25, str(commit))}
    assert len(seen) == 100


def test_slow_ones_are_left_out():
    slow = Item(nodeid="slow", get_closest_marker=lambda name: name == "slow")
    assert kept([slow, *items(one=1)], 0.25, "abc") == ["one[0]"]
