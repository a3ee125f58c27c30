"""What a scheduler gave, read from the variables that each of them sets."""

import pytest

from hpc_absa.allocation import expand, present
from hpc_absa.errors import UsageError


@pytest.mark.parametrize(
    ("nodelist", "nodes"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("n[08-10],login", ["n08", "n09", "n10", "login"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a-[1,3]-ib,b", ["a-1-ib", "a-3-ib", "b"]),
        ("", []),
    ],
)
def test_slurms_short_form_of_nodes(nodelist, nodes):
    assert list(expand(nodelist)) == nodes


def test_slurm():
    given = present(
        {
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-3],m1",
            "SLURM_TASKS_PER_NODE": "4(x3),2",
        }
    )
    assert given.hosts == (("n1", 4), ("n2", 4), ("n3", 4), ("m1", 2))
    assert given.slots == 14
    assert str(given) == "Slurm job 17: 14 slots on 4 hosts"


def test_pbs_and_lsf_count_lines(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("b\nb\na\nb\n")
    for told in (
        {"PBS_JOBID": "3.server", "PBS_NODEFILE": str(nodes)},
        {"LSB_JOBID": "3", "LSB_DJOB_HOSTFILE": str(nodes), "LSB_MCPU_HOSTS": "c 1"},
    ):
        assert present(told).hosts == (("b", 3), ("a", 1))


def test_lsf_without_a_file():
    told = {"LSB_JOBID": "3", "LSB_MCPU_HOSTS": "a 4 b 2"}
    assert present(told).hosts == (("a", 4), ("b", 2))


def test_outside_of_any():
    assert present({}) is None
    assert present({"SLURM_JOB_NODELIST": "n1"}) is None


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "x"},
            r"SLURM_TASKS_PER_NODE = 'x': expected a list like 4\(x3\),2",
        ),
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2"},
            "is of 1 nodes, SLURM_JOB_NODELIST of 2",
        ),
        ({"PBS_JOBID": "1", "PBS_NODEFILE": "/none"}, "PBS_NODEFILE = '/none': cannot be read"),
        ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "a 4 b"}, "LSB_MCPU_HOSTS = 'a 4 b': expected"),
    ],
)
def test_what_no_scheduler_would_say_is_named(told, message):
    with pytest.raises(UsageError, match=message):
        present(told)
