"""Fixtures: devices, model pairs, a process group. ``gpu`` tests skip without CUDA."""

import os

import pytest
import torch
import torch.distributed as dist

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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


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
