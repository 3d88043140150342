"""The pool of ranks ends with the session."""

import pool
import pytest


@pytest.fixture(scope="session", autouse=True)
def ranks_end():
    yield
    pool.shutdown()
