import pytest

from tests.supervisor.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands are on PATH and print what the test wants."""
    fake = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", fake.path)
    return fake
