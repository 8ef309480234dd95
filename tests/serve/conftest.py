"""Shared by the tests of the server."""

from __future__ import annotations

import pytest
from fake_service import deepseek_folder
from learnt import learn
from server_fixtures import running


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory, corpus, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHALEPOD_CACHE", str(cache))
        return deepseek_folder(tmp_path_factory.mktemp("deepseek"), corpus)


@pytest.fixture
def server(deepseek):
    with running(*deepseek) as found:
        yield found


@pytest.fixture(scope="session")
def learnt(tmp_path_factory, corpus, cache, small_model):
    """A folder with the `run` of a small model and the `hf` that it was exported to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHALEPOD_CACHE", str(cache))
        return learn(tmp_path_factory.mktemp("learnt"), corpus, small_model)
