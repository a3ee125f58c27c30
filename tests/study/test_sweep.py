"""The sweep file: its cells, and the errors in it."""

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.study import sweep as sweeps
from tests import job_files

BASE = """
name = "base"
[data]
name = "digits"
[model]
name = "digits-cnn"
[train]
epochs = 4
microbatch = 32
lr = 0.05
[schedule]
method = "absa"
base_batch = 32
max_batch = 128
kappa = 3
ratio = 0.3
"""
SWEEP = """
name = "small"
job = "base.toml"
seeds = [0, 1]
[[grid]]
schedule = ["bl"]
max_batch = [32]
[[grid]]
schedule = ["bl", "absa"]
max_batch = [128]
"""


@pytest.fixture(name="load")
def _load(tmp_path):
    """Reads a sweep's text, with `base.toml` in the same folder."""

    def load(text=SWEEP, *overrides):
        (tmp_path / "base.toml").write_text(BASE)
        (tmp_path / "sweep.toml").write_text(text)
        return sweeps.load(tmp_path / "sweep.toml", overrides)

    return load


def test_cells_are_every_schedule_with_every_batch_and_seed(load):
    _, cells = load()
    assert [cell.name for cell in cells] == [
        "bl-32-seed0",
        "bl-32-seed1",
        "bl-128-seed0",
        "bl-128-seed1",
        "absa-128-seed0",
        "absa-128-seed1",
    ]
    for cell in cells:
        schedule = cell.job.schedule
        assert (schedule.method, schedule.largest_batch, cell.job.seed) == (
            cell.schedule,
            cell.max_batch,
            cell.seed,
        )
        assert cell.job.train.lr == 0.05


def test_keys_of_the_base_schedule_apply_to_the_methods_that_have_them(load):
    grid = '[[grid]]\nschedule = ["bl", "abs", "absa", "absa-tuned"]\n'
    _, cells = load(SWEEP.split("[[grid]]")[0].replace("[0, 1]", "[0]") + grid)
    bl, abs_, absa, tuned = (cell.job.schedule for cell in cells)
    assert bl.largest_batch == 128
    assert (abs_.kappa, absa.kappa, absa.ratio) == (3, 3, 0.3)
    assert (tuned.kappa, tuned.estimate_every) == (3, 2)


def test_base_job_inside_the_sweep_file(load):
    inline = (
        BASE.replace('name = "base"', "[job]").replace("\n[", "\n[job.").replace("job.job", "job")
    )
    _, cells = load(SWEEP.replace('job = "base.toml"\n', "") + inline)
    assert len(cells) == 6
    assert cells[0].job.train.epochs == 4


def test_overrides_for_all_cells_for_an_entry_and_from_the_command(load):
    text = SWEEP.replace("seeds", 'set = ["train.epochs=5", "train.lr=0.1"]\nseeds', 1)
    text += 'set = ["train.epochs=6", "schedule.lr_rule=none"]\n'
    _, cells = load(text, "train.lr=0.2")
    assert [cell.job.train.epochs for cell in cells] == [5, 5, 6, 6, 6, 6]
    assert {cell.job.train.lr for cell in cells} == {0.2}


def test_label_distinguishes_entries_of_the_same_schedule(load):
    more = '[[grid]]\nschedule = ["absa"]\nmax_batch = [128]\nseeds = [7]\nlabel = "r = 0.4"\n'
    _, cells = load(SWEEP + more + 'set = ["schedule.ratio=0.4"]\n')
    assert (cells[-1].name, cells[-1].schedule, cells[-1].seed) == (
        "absa-r-=-0.4-128-seed7",
        "absa r = 0.4",
        7,
    )
    assert cells[-1].job.schedule.ratio == 0.4


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('name = "small"\n', "", "sweep.toml: name: missing, expected a value"),
        ("seeds", "seedz", "sweep.toml: seedz = [0, 1]: unknown key, expected 'seeds'?"),
        ("max_batch = [32]", "batch = 3", "grid.0.batch = 3: unknown key, expected 'max_batch'?"),
        ("max_batch = [32]", "max_batch = 32", "grid.0.max_batch = 32: expected a list"),
        ("[0, 1]", "[]", "sweep.toml: seeds = []: expected"),
        ("[0, 1]", "[-1]", "seeds.0 = -1: expected greater than or equal to 0"),
        ('["bl"]', "[]", "grid.0.schedule = []: expected"),
        ('["bl"]', '["blu"]', "schedule.method = 'blu': expected one of abs, absa, absa-tuned"),
        ("[32]", "[33]", "base.toml: schedule.max_batch = 33: expected a multiple of train.micro"),
        ("[32]", "[128]", "grid: cell bl-128-seed0 is there twice; give one of its entries a la"),
        ("[32]", "[128", "sweep.toml: not valid TOML"),
        ('"base.toml"', "3", "sweep.toml: job = 3: expected a valid string"),
        ("base.toml", "none.toml", "none.toml: cannot be read as a job file: [Errno 2]"),
        ("seeds", 'set = ["train.epoch=3"]\nseeds', "train.epoch = 3: unknown key, expected 'ep"),
        ("seeds", "side_by_side = 0\nseeds", "side_by_side = 0: expected greater than 0"),
        ("[[grid]]", "[[grids]]", "grid: missing, expected a value"),
    ],
)
def test_an_error_is_one_line(load, old, new, line):
    with pytest.raises(UsageError) as caught:
        load(SWEEP.replace(old, new))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml: cannot be read as a sweep file"):
        sweeps.load(tmp_path / "none.toml")


@pytest.mark.parametrize("path", job_files.SWEEP_FILES, ids=job_files.name)
def test_every_sweep_file_of_the_repository_loads(path):
    _, cells = sweeps.load(path)
    assert len(cells) > 1


def test_a_job_file_is_named_as_one(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('name = "x"\n[schedule]\nmethod = "bl"\n')
    with pytest.raises(UsageError, match="a job file, expected a sweep file: hpc-absa run"):
        sweeps.load(path)
