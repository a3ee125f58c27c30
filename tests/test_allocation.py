"""The resources of a job, read from the variables of each scheduler."""

import pytest

from hpc_absa import allocation
from hpc_absa.allocation import detect, expand
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
def test_slurms_node_lists(nodelist, nodes):
    assert list(expand(nodelist)) == nodes


def test_slurm():
    allocation = detect(
        {
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-3],m1",
            "SLURM_TASKS_PER_NODE": "4(x3),2",
        }
    )
    assert allocation.hosts == (("n1", 4), ("n2", 4), ("n3", 4), ("m1", 2))
    assert allocation.slots == 14
    assert str(allocation) == "Slurm job 17: 14 slots on 4 hosts"


def test_pbs_and_lsf_count_lines(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("b\nb\na\nb\n")
    for variables in (
        {"PBS_JOBID": "3.server", "PBS_NODEFILE": str(nodes)},
        {"LSB_JOBID": "3", "LSB_DJOB_HOSTFILE": str(nodes), "LSB_MCPU_HOSTS": "c 1"},
    ):
        assert detect(variables).hosts == (("b", 3), ("a", 1))


def test_lsf_without_a_file():
    variables = {"LSB_JOBID": "3", "LSB_MCPU_HOSTS": "a 4 b 2"}
    assert detect(variables).hosts == (("a", 4), ("b", 2))


def test_grid_engine_has_a_line_a_host(tmp_path):
    (tmp_path / "hosts").write_text("a 4 main@a UNDEFINED\nb 2 main@b UNDEFINED\n")
    variables = {"JOB_ID": "3", "PE_HOSTFILE": str(tmp_path / "hosts")}
    assert detect(variables).hosts == (("a", 4), ("b", 2))
    (tmp_path / "hosts").write_text("a\n")
    with pytest.raises(UsageError, match="expected lines like `a 4 queue range`"):
        detect(variables)
    assert detect({"JOB_ID": "3"}) is None


def test_outside_any_allocation():
    assert detect({}) is None
    assert detect({"SLURM_JOB_NODELIST": "n1"}) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "x"},
            r"SLURM_TASKS_PER_NODE = 'x': expected a list like 4\(x3\),2",
        ),
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2"},
            "is for 1 nodes, SLURM_JOB_NODELIST for 2",
        ),
        ({"PBS_JOBID": "1", "PBS_NODEFILE": "/none"}, "PBS_NODEFILE = '/none': cannot be read"),
        ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "a 4 b"}, "LSB_MCPU_HOSTS = 'a 4 b': expected"),
    ],
)
def test_values_that_no_scheduler_sets_are_errors(variables, message):
    with pytest.raises(UsageError, match=message):
        detect(variables)


@pytest.mark.parametrize(
    ("variables", "requested"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),  # a script in a job, outside any step
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, ("SLURM_STEP_NUM_TASKS", 4)),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, ("SLURM_NTASKS", 4)),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}, ("PMI_SIZE", 4)),
        # mpirun's daemons are tasks of a step of their own
        (
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "8"},
            ("OMPI_COMM_WORLD_SIZE", 8),
        ),
        ({"PMI_SIZE": "1", "HPC_ABSA_RANKS": "2"}, ("HPC_ABSA_RANKS", 2)),
        ({"PMI_SIZE": "many"}, None),
    ],
)
def test_requested_ranks(variables, requested):
    assert allocation.requested_ranks(variables) == requested


def test_the_launchers_rank():
    assert allocation.launcher_rank({}) == 0
    assert allocation.launcher_rank({"SLURM_PROCID": "3"}) == 3
    assert allocation.launcher_rank({"OMPI_COMM_WORLD_RANK": "1", "SLURM_PROCID": "0"}) == 1
