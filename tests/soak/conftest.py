"""The campaigns' common summary, printed when the session ends."""

import os

import pytest

from tests.soak.summary import Summary

_SUMMARY = pytest.StashKey[Summary]()


def pytest_configure(config):
    config.stash[_SUMMARY] = Summary()


@pytest.fixture(scope="session")
def campaign(request) -> Summary:
    """Where the campaigns count their cases."""
    return request.config.stash[_SUMMARY]


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash[_SUMMARY].table():
        terminalreporter.section(f"campaigns, seed {os.environ.get('HPC_ABSA_SOAK_SEED', '0')}")
        for line in lines:
            terminalreporter.write_line(line)
