"""docs/job-file.md lists every key of a job file with its default, and the renamed keys."""

import re
from pathlib import Path

import pytest

from hpc_absa import config

PAGE = (Path(__file__).parents[2] / "docs" / "job-file.md").read_text(encoding="utf-8")
METHODS = (
    "bl", "fb", "gg", "abs", "absa", "absa-tuned", "gns", "norm-test", "seesaw", "steps", "random"
)  # fmt: skip
REQUIRED = {
    "name": "a",
    "data": {"name": "digits"},
    "model": {"name": "digits-cnn"},
    "train": {"epochs": 1, "microbatch": 32, "lr": 0.1},
    "schedule": {"method": "bl", "base_batch": 64},
}


def rows(section):
    """The rows of a section's tables as lists of cells."""
    (text,) = re.findall(rf"(?ms)^## {re.escape(section)}$(.*?)(?=^## |\Z)", PAGE)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def defaults(method="bl"):
    tables = {**REQUIRED, "schedule": {"method": method, "base_batch": 64}}
    return config.from_tables(tables, "test").model_dump(mode="json", by_alias=True)


def setting(tables, key):
    for part in key.split("."):
        tables = tables[part]
    return tables


def as_cell(value):
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ("Top level", ()),
        ("`[data]`", ("data",)),
        ("`[model]`", ("model",)),
        ("`[train]`", ("train",)),
        ("`[hessian]`", ("hessian",)),
        ("`[ranks]`", ("ranks",)),
        ("`[checkpoint]`", ("checkpoint",)),
        ("`[launch]`", ("launch",)),
        ("`[launch.slurm]`", ("launch", "slurm")),
    ],
)
def test_every_key_has_a_row_with_its_default(section, path):
    table, given = defaults(), REQUIRED
    for key in path:
        table, given = table[key], given.get(key, {})
    expected = {
        key: "required" if key in given else as_cell(value)
        for key, value in table.items()
        if not isinstance(value, dict)
    }
    assert {cells[0].strip("`"): cells[1] for cells in rows(section)} == expected


def test_every_key_of_a_schedule_has_its_default_by_method():
    cells = {row[0].strip("`"): row[1:] for row in rows("`[schedule]`")}
    assert cells["base_batch"][0] == cells["method"][0] == "required"
    assert cells["max_batch"][0] == "not set"
    common = {"method", "base_batch", "max_batch"}
    for column, method in enumerate(METHODS):
        table = {k: v for k, v in defaults(method)["schedule"].items() if k not in common}
        columns = {key: row[column] for key, row in cells.items() if key not in common}
        documented = {key: cell for key, cell in columns.items() if cell != "–"}
        assert documented == {key: as_cell(value) for key, value in table.items()}, method
    assert {method for method in config.SCHEDULES if ":" not in method} == set(METHODS)


def test_defaults_of_the_hessian_that_depend_on_the_method():
    cells = {row[0].strip("`"): row[3] for row in rows("`[hessian]`")}
    tuned = defaults("absa-tuned")["hessian"]
    assert f"{tuned['tol']} for `absa-tuned`" in cells["tol"]


@pytest.mark.parametrize(("old", "new"), [row[:2] for row in rows("Renamed keys")])
def test_a_former_key_is_read_under_its_new_name(old, new):
    old, new = old.strip("`"), new.strip("`")
    if "=" not in old:
        default = setting(defaults(), new)
        value = {bool: "true", str: '"other"', int: "7"}.get(type(default), "7.0")
        old, new = f"{old} = {value}", f"{new} = {value}"
    jobs = [config.from_tables(REQUIRED, "test", (key,), warn=False) for key in (old, new)]
    assert jobs[0] == jobs[1]
    if not new.endswith("false"):
        assert jobs[0] != config.from_tables(REQUIRED, "test")


@pytest.mark.parametrize("part", config.WITHOUT_EFFECT)
def test_parts_that_may_change_are_listed(part):
    (text,) = re.findall(r"(?s)## Changing the job of a started run(.*?)## ", PAGE)
    assert f"`{part}`" in text or f"`[{part}]`" in text
