"""What all tests share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is learned of operators during tests stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
