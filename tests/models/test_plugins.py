import sys

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.plugins import call, is_reference, resolve

MODULE = """
class Box:
    def inner(x):
        return x

value = 3

def plain(a, b=2, *, c=3):
    return a, b, c

def anything(a, **more):
    return a, more
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "plug_good.py").write_text(MODULE)
    (tmp_path / "plug_syntax.py").write_text("def f(:\n")
    (tmp_path / "plug_fails.py").write_text("raise OSError('no licence server')\n")
    (tmp_path / "plug_needs.py").write_text("import not_installed_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


def test_modules_of_the_current_folder_are_imported():
    assert resolve("plug_good:plain", "model.name")(1) == (1, 2, 3)
    assert resolve("plug_good:Box.inner", "model.name")(7) == 7


def test_the_current_folder_hides_no_other_module(folder):
    (folder / "json.py").write_text("raise RuntimeError")
    assert resolve("json:loads", "model.name")("1") == 1
    assert sys.path[-1] == str(folder)


def test_is_reference():
    assert is_reference("a.b:c")
    assert not is_reference("resnet20")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("plug_good", 'm.name: "plug_good" is not of the form "package.module:function"'),
        ("plug good:x", "is not of the form"),
        (":x", "is not of the form"),
        ("plug_good:", "is not of the form"),
        ("plug_none:x", 'm.name: no module "plug_none" in .* or on PYTHONPATH'),
        ("plug_good.sub:x", 'no module "plug_good.sub"'),
        ("plug_good:plan", 'module "plug_good" has no "plan"; did you mean plain'),
        ("plug_good:value", '"plug_good:value" is of type int, expected something callable'),
        ("plug_syntax:f", 'importing module "plug_syntax" failed: SyntaxError: .*line 1'),
        ("plug_fails:f", 'importing module "plug_fails" failed: OSError: no licence server'),
        ("plug_needs:f", '"plug_needs" needs a missing module: .*not_installed_at_all'),
    ],
)
def test_references_that_cannot_be_resolved(reference, message):
    with pytest.raises(UsageError, match=message) as error:
        resolve(reference, "m.name")
    assert "\n" not in str(error.value)


def test_call_passes_offered_arguments_that_the_function_takes():
    plain = resolve("plug_good:plain", "m.name")
    assert call(plain, "m", {"c": 9}, {"a": 1, "unused": 0}) == (1, 2, 9)
    # The job's arguments have precedence.
    assert call(plain, "m", {"a": 5}, {"a": 1}) == (5, 2, 3)
    anything = resolve("plug_good:anything", "m.name")
    assert call(anything, "m", {"x": 1}, {"a": 0, "y": 2}) == (0, {"x": 1, "y": 2})


def test_call_lists_the_valid_arguments():
    plain = resolve("plug_good:plain", "m.name")
    with pytest.raises(UsageError, match=r"m.d: plain has no such argument; valid ones: b, c"):
        call(plain, "m", {"d": 1}, {"a": 1})
    with pytest.raises(UsageError, match=r"m.a: plain needs this argument, and it is not given"):
        call(plain, "m", {}, {})
