"""A Hub on loopback, new for each test."""

from pathlib import Path

import pytest
from hub.server import HubServer


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("hub")


@pytest.fixture
def hub():
    """A Hub with two users, and a token of the first that may read only."""
    tokens = {"hf_owner": "org", "hf_reader": "org", "hf_other": "other"}
    with HubServer(tokens, read_only=["hf_reader"]) as server:
        yield server
