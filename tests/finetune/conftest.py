import pytest
import runs


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny one that four ranks can share; nothing writes into it."""
    return runs.tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")
