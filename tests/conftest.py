"""What all tests share."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is loaded: threads that wait must not keep others from working
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is learned of operators during tests stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """While the tests of a module run, kernels take one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
