import importlib
import subprocess
import sys

import pytest

from hpc_absa import torchvision_import as vision
from hpc_absa.errors import UsageError

SHIM = """
import importlib, sys, torch
from hpc_absa import torchvision_import as vision

real, tries = importlib.import_module, []

def import_module(name, package=None):
    if name == "torchvision":
        tries.append(name)
        if len(tries) == 1:
            sys.modules["torchvision.half"] = object()
            raise RuntimeError("operator torchvision::nms does not exist")
    return real(name, package)

importlib.import_module = import_module
vision.torchvision()
assert len(tries) == 2
assert "torchvision.half" not in sys.modules
# Declared, and an existing operator is not defined again.
assert hasattr(torch.ops.torchvision, "nms")
assert len(vision.torchvision().models.list_models()) > 50
"""


def test_operators_are_declared_and_the_import_repeated_if_it_fails():
    subprocess.run([sys.executable, "-c", SHIM], check=True, timeout=120)


def fresh(monkeypatch, outcome):
    """`vision.torchvision` as in a new process, with an import with this outcome."""

    def import_module(name):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def declared():
        raise AssertionError("operators are declared although the import works")

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(vision, "_declare_operators", declared)
    return vision.torchvision.__wrapped__


def test_nothing_is_declared_if_the_import_works(monkeypatch):
    assert fresh(monkeypatch, sys)() is sys


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'torchvision'"), "torchvision cannot be imported"),
        (RuntimeError("compiled with another CUDA"), "does not fit this torch"),
    ],
)
def test_other_failures_are_explained(monkeypatch, error, message):
    with pytest.raises(UsageError, match=message):
        fresh(monkeypatch, error)()


USERS_MODULE = """
import os, sys, torch
from pathlib import Path
from hpc_absa import torchvision_import as vision

package = Path(sys.argv[1]) / "torchvision"
package.mkdir()
(package / "part.py").write_text("value = 3")
(package / "__init__.py").write_text(
    "import torch\\nfrom torchvision import part\\n"
    "if not hasattr(torch.ops.torchvision, 'nms'):\\n"
    "    raise RuntimeError('operator torchvision::nms does not exist')\\n"
)
sys.path.insert(0, sys.argv[1])
vision.prepare_torchvision()
vision.prepare_torchvision()
import torchvision
from torchvision import part
assert part.value == 3 and torchvision.__file__ == str(package / "__init__.py")
assert torchvision.__spec__.name == "torchvision"
assert sum(isinstance(finder, vision._Finder) for finder in sys.meta_path) == 1
"""


def test_a_users_module_can_import_torchvision_by_itself(tmp_path):
    subprocess.run([sys.executable, "-c", USERS_MODULE, tmp_path], check=True, timeout=120)
