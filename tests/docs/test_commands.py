"""The commands in README and docs are executed, block by block, as a reader would."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.docs.pages import ROOT, commands, shell_blocks

BLOCKS = list(shell_blocks())
NOT_EXECUTED = {
    r"^make\b": "builds an environment: tests/setup, and the test suite itself",
    r"slurm": "needs a cluster: tests/slurm",
    r"^module |^ssh |exec hpc-absa": "needs a site's modules, another host, an allocation",
    r" -H | --hostfile ": "needs hosts: tests/supervisor",
    r"hpc-absa serve ": "runs until it is stopped: tests/serve",
    r"\bcompare (?!.*--dry-run)": "takes hours: tests/study",
    r"run jobs/cifar10": "takes hours: tests/training",
    r"^python -m benchmarks": "takes minutes",
    r"-np 4 ": "needs four cores",
    r"mydata|my\.toml|runs/my\b|train\.py|job\.toml|runs/cifar10|runs/bl-64": "of the reader's own",
    r"^python elastic|-- python elastic": "in the folder of the examples; the tutorial runs them",
    r"imagenet-times": "needs ImageNet",
}
"""Why a command is not executed."""


def reason(command):
    found = [why for pattern, why in NOT_EXECUTED.items() if re.search(pattern, command)]
    if not found and command.startswith("h5ls") and not shutil.which("h5ls"):
        found = ["h5ls is not installed"]
    return found[0] if found else None


def test_every_reason_is_needed_and_most_commands_are_executed():
    every = [command for block in BLOCKS for command in commands(block)]
    for pattern in NOT_EXECUTED:
        assert any(re.search(pattern, command) for command in every), pattern
    assert sum(reason(command) is None for command in every) > 40


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    """A clone's folders, the environment as `.venv`, small images, and the run of the digits."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("jobs", "examples", "launch", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for label in range(10):
            place = folder / "images" / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    execute(folder, "hpc-absa run jobs/digits.toml")  # the run that many blocks are about
    shutil.copytree(folder / "runs/digits", folder / "runs/demo")
    return folder


def execute(folder, script):
    """Runs a script in bash, as in an activated environment; fails with its output."""
    environment = os.environ | {
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_can_be_executed(folder, block):
    found = commands(block)
    script = "\n".join(command for command in found if reason(command) is None)
    if not script:
        pytest.skip("; ".join(dict.fromkeys(filter(None, map(reason, found)))))
    execute(folder, script.replace("=DIR", "=images").replace(" DIR", " images"))
