"""Fixtures: devices, model pairs, a process group. ``gpu`` tests skip without CUDA. ``--cases``: a share of the suite."""

import argparse
import os

import pytest
import torch
import torch.distributed as dist
from case_shares import left_out

from models import twins

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreter: cheap enough to run under TRITON_INTERPRET=1 as well")
    # the models are tiny: threads cost more than they bring
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        # "bit-equal" is a claim about our code, not about the order of atomic adds in torch's
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _share(given: str) -> float:
    if not 0 < (share := float(given)) <= 1:
        raise argparse.ArgumentTypeError(f"a share of the cases is over 0 and at most 1, got {given}")
    return share


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=_share,
        default=1.0,
        metavar="SHARE",
        help="this share of every test's cases, one at least, others with every commit, and no test marked slow (default: all)",
    )


def _commit() -> str:
    # only a run of a share pays for the import
    from m3kernels.bench.results import commit

    return commit()


def pytest_report_header(config):
    share = config.getoption("cases")
    return None if share >= 1 else f"cases: {share:.0%} of every test's, those of {_commit()}"


# after what -k and -m leave out
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    runnable = items
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        runnable = [item for item in items if not item.get_closest_marker("gpu")]
    if (share := config.getoption("cases")) < 1:
        found = left_out(runnable, share, _commit())
        config.hook.pytest_deselected(items=[item for item in items if item in found])
        items[:] = [item for item in items if item not in found]


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


@pytest.fixture(params=["text", "vlm"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def pair(kind, device):
    """(plain, patched) of each kind on each device, fp32."""
    return twins(kind, device=device)


@pytest.fixture
def text_pair(device):
    return twins("text", device=device)


@pytest.fixture
def vlm_pair(device):
    return twins("vlm", device=device)


@pytest.fixture
def process_group():
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
