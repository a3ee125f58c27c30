"""How many ranks a batch feeds, and which rank computes which microbatch."""

import os
from importlib.machinery import ModuleSpec

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.worldsize import gpus_here, hosts, limit, ranks_for, share

JOB = """
name = "a"
[data]
name = "digits"
[model]
name = "m"
[train]
epochs = 1
microbatch = 10
lr = 0.1
[schedule]
method = "bl"
base_batch = 10
"""


def job(*overrides):
    return config.parse(JOB, "test", overrides)


@given(st.integers(0, 200), st.integers(0, 300), st.integers(1, 40))
def test_shares_are_a_balanced_partition_in_order(start, count, size):
    microbatches = range(start, start + count)
    shares = [share(microbatches, rank, size) for rank in range(size)]
    assert [k for each in shares for k in each] == list(microbatches)
    lengths = {len(each) for each in shares}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("microbatches", "most", "ranks"),
    [(1, 4, 1), (2, 4, 2), (4, 4, 4), (5, 4, 3), (6, 4, 3), (7, 4, 4), (8, 4, 4), (9, 1, 1)],
)
def test_ranks_that_shorten_the_step(microbatches, most, ranks):
    assert ranks_for(job(), 10 * microbatches, most) == ranks


@pytest.mark.parametrize(("per_rank", "ranks"), [(1, 8), (2, 4), (3, 2), (8, 1), (9, 1)])
def test_each_rank_has_its_microbatches(per_rank, ranks):
    assert ranks_for(job(f"ranks.microbatches_per_rank={per_rank}"), 80, 16) == ranks


def test_never_fewer_than_the_first_phase_had():
    assert ranks_for(job("ranks.initial=3"), 10, 8) == 3


@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 8))
def test_fewer_ranks_would_be_slower(microbatches, most, initial):
    ranks = ranks_for(job(f"ranks.initial={initial}"), 10 * microbatches, most)
    assert initial <= ranks <= max(initial, most)
    rounds = -(-microbatches // ranks)
    widest = max(initial, min(microbatches, most))
    assert rounds == -(-microbatches // widest)
    assert ranks == initial or -(-microbatches // (ranks - 1)) > rounds


@given(st.integers(1, 64), st.integers(1, 32), st.sampled_from([1, 2, 4, 8]))
def test_reproducible_jobs_have_a_power_of_two(microbatches, most, initial):
    reproducible = job("train.reproducible=true", f"ranks.initial={initial}")
    ranks = ranks_for(reproducible, 10 * microbatches, most)
    assert ranks & (ranks - 1) == 0
    assert initial <= ranks <= max(initial, most)
    assume(ranks > initial)
    assert -(-microbatches // (ranks // 2)) > -(-microbatches // ranks)


def test_reproducible_jobs_have_at_most_64_ranks():
    """The ranks would refuse to start with more."""
    assert ranks_for(job("train.reproducible=true"), 10 * 128, 128) == 64
    assert ranks_for(job(), 10 * 128, 128) == 128


@pytest.mark.parametrize(
    ("version", "visible", "overrides", "expected"),
    [
        ("cuda: Optional[str] = '12.8'", None, (), 2),
        ("cuda: Optional[str] = '12.8'", "1", (), 1),
        ("cuda: Optional[str] = '12.8'", "", (), 0),
        ("cuda: Optional[str] = '12.8'", "-1", (), 0),
        ("cuda: Optional[str] = '12.8'", "1,-1", (), 1),
        ("cuda: Optional[str] = '12.8'", None, ("train.device=cpu",), 0),
        ("cuda: Optional[str] = '12.8'", None, ("launch.hosts=a:4",), 0),
        ("cuda: Optional[str] = None", None, (), 0),
    ],
)
def test_gpus_of_this_host(tmp_path, monkeypatch, version, visible, overrides, expected):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text(f"debug = False\n{version}\nhip = None\n")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "torch/__init__.py"))
    monkeypatch.setattr("hpc_absa.worldsize.find_spec", lambda name: spec)
    monkeypatch.setattr("hpc_absa.worldsize.allocation.detect", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_here(job(*overrides), tmp_path) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a", [("a", 1)]),
        ("a:4,b", [("a", 4), ("b", 1)]),
        ("node-1.cluster:16, node-2.cluster:8", [("node-1.cluster", 16), ("node-2.cluster", 8)]),
        ("10.0.0.1:2", [("10.0.0.1", 2)]),
    ],
)
def test_hosts(words, expected):
    assert hosts(words) == expected


@pytest.mark.parametrize("word", ["", ":4", "b:", "b:x", "b:-1", "b:0", "b:00", "b:1.5", "b:1:2"])
def test_invalid_hosts(word):
    with pytest.raises(UsageError, match=r"launch\.hosts = .*expected host or host:slots"):
        job(f"launch.hosts=a:4,{word}")


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (("ranks.max=7", "launch.hosts=a:4"), 7),
        (("launch.hosts=a:4,b:2",), 6),
        (("ranks.initial=999",), 999),
        ((), len(os.sched_getaffinity(0))),
    ],
)
def test_the_largest_number_of_ranks(overrides, ranks):
    assert limit(job(*overrides)) == ranks
