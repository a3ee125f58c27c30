"""The job file: valid and invalid ones, overrides, old keys, changes to the job of a run."""

import ast
import inspect
import textwrap
import tomllib
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from hpc_absa import config
from hpc_absa.config import file, tables
from hpc_absa.errors import ExitStatus, UsageError
from tests import job_files

DIGITS = Path(__file__).parents[2] / "jobs" / "digits.toml"

JOB = """
name = "a"
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
"""


def parse(*overrides, text=JOB):
    return config.parse(text, "job.toml", overrides)


def refusal(*overrides, text=JOB):
    """The one line of the error."""
    with pytest.raises(UsageError) as caught:
        parse(*overrides, text=text)
    assert caught.value.status == ExitStatus.USAGE
    line = str(caught.value)
    assert "\n" not in line
    return line


# Valid files


@pytest.mark.parametrize("path", job_files.JOB_FILES, ids=job_files.name)
def test_every_job_of_the_package_loads(path):
    job = config.load(path)
    assert config.parse(config.dump(job), "dump") == job


def test_defaults():
    job = parse()
    assert job.schedule.alpha == 2.0
    assert job.hessian == config.Hessian()
    assert job.checkpoint.background
    assert job.schedule.largest_batch == 128
    assert parse(text=JOB.replace("max_batch = 128", "")).schedule.largest_batch == 32


def test_other_keys_of_data_and_model_are_their_arguments():
    job = parse("data.root=/d", "data.fold=2", "model.depth=20", "model.widen={to=4, by=[1, 2]}")
    assert job.data.arguments == {"fold": 2}
    assert job.model.arguments == {"depth": 20, "widen": {"to": 4, "by": [1, 2]}}
    assert config.parse(config.dump(job), "dump") == job


VALUES = {
    "name": st.text(max_size=8),
    "seed": st.integers(0, 2**63 - 1),
    "data.root": st.text(max_size=8),
    "data.flip": st.booleans(),
    "model.anything": st.lists(st.integers() | st.text(max_size=3), max_size=2),
    "train.lr": st.floats(1e-300, 1e300),
    "train.milestones": st.sets(st.integers(1, 10**9), max_size=4).map(sorted),
    "train.weight_decay": st.floats(0, 1),
    "schedule.kappa": st.integers(1, 2**62),
    "hessian.every": st.integers(1, 2**62),
    "checkpoint.async": st.booleans(),
    "checkpoint.every_seconds": st.floats(1e-9) | st.just(float("inf")),
    "launch.extra": st.lists(st.text(max_size=6), max_size=3),
    "launch.slurm": st.fixed_dictionaries(
        {},
        optional={
            "gpus-per-node": st.integers(1, 64),
            "sbatch": st.lists(st.just("--exclusive"), max_size=2),
            "time": st.integers() | st.just("1-00:00:00"),
        },
    ),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
@settings(max_examples=50)
def test_a_dumped_job_is_parsed_to_the_same_job(changes):
    tables = tomllib.loads(JOB)
    for key, value in changes.items():
        *section, name = key.split(".")
        target = tables.setdefault(section[0], {}) if section else tables
        target[name] = value
    job = config.Job.model_validate(tables)
    assert config.parse(config.dump(job), "dump") == job


def models():
    """All tables, and the base classes of their fields."""
    in_config = [m for m in vars(tables).values() if isinstance(m, type)]
    classes = {base for m in [*in_config, *config.SCHEDULES.values()] for base in m.__mro__}
    ours = (m for m in classes if issubclass(m, BaseModel) and m.__module__.startswith("hpc_absa"))
    return sorted(ours, key=lambda model: model.__name__)


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_field_is_described(model):
    assert model.__doc__
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    described = {
        field.target.id
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(getattr(text, "value", 0), ast.Constant)
    }
    fields = inspect.get_annotations(model).keys() & model.model_fields.keys()
    assert fields <= described


def test_a_job_is_frozen():
    job = parse()
    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        job.train.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        job.data.root = "elsewhere"


# Invalid files


@pytest.mark.parametrize(
    ("override", "line"),
    [
        # Unknown keys
        ("train.epoch=3", "train.epoch = 3: unknown key, expected 'epochs'?"),
        ("schedule.alfa=3", "schedule.alfa = 3: unknown key, expected 'alpha'?"),
        ("hesian.tol=1", "hesian = {'tol': 1}: unknown key, expected 'hessian'?"),
        ("checkpoint.asynch=true", "checkpoint.asynch = True: unknown key, expected 'async'?"),
        ("ranks.zzz=1", "ranks.zzz = 1: unknown key, expected one of initial, max, microb"),
        # Types
        ("train.epochs=three", "train.epochs = 'three': expected a valid integer"),
        ("train.epochs='3'", "train.epochs = '3': expected a valid integer"),
        ("train.epochs=3.5", "train.epochs = 3.5: expected a valid integer"),
        ("train.epochs=true", "train.epochs = True: expected a valid integer"),
        ("train.epochs=", "train.epochs = '': expected a valid integer"),
        ("train.lr=fast", "train.lr = 'fast': expected a valid number"),
        ("train.reproducible=1", "train.reproducible = 1: expected true or false"),
        ("train.milestones=3", "train.milestones = 3: expected a list"),
        ("train.milestones=[3, 4.5]", "train.milestones.1 = 4.5: expected a valid integer"),
        ("launch.extra=--x", "launch.extra = '--x': expected a list"),
        ("launch.slurm.time=1.5", "launch.slurm.time = 1.5: expected a valid string"),
        ("launch.slurm.partiton=x", "launch.slurm.partiton = 'x': unknown key"),
        ("launch.slurm.account=a b", "launch.slurm.account = 'a b': expected"),
        ('launch.slurm.sbatch=["x"]', "launch.slurm.sbatch = ['x']: expected options"),
        ("name=3", "name = 3: expected a valid string"),
        ("train=3", "train = 3: expected a table"),
        ("schedule=[]", "schedule = []: expected a table"),
        # Ranges
        ("seed=-1", "seed = -1: expected greater than or equal to 0"),
        ("seed=9223372036854775808", "seed = 9223372036854775808: expected less than"),
        ("train.epochs=0", "train.epochs = 0: expected greater than 0"),
        ("train.lr=0", "train.lr = 0: expected greater than 0"),
        ("train.lr=inf", "train.lr = inf: expected a finite number"),
        ("train.lr=nan", "train.lr = nan: expected a finite number"),
        ('train.metrics="accuracy"', "train.metrics = 'accuracy': expected a list"),
        ('train.metrics=["top0"]', "train.metrics = 'top0': expected one of accuracy, top5"),
        ('train.loss="hinge"', "train.loss = 'hinge': expected one of cross_entropy, bce_with_log"),
        ("data.input_range=[1, 0]", "data.input_range = [1.0, 0.0]: expected two numbers"),
        ("data.workers=-1", "data.workers = -1: expected greater than or equal to 0"),
        ("optimizer=3", "optimizer = 3: expected a table"),
        ("train.momentum=1", "train.momentum = 1: expected less than 1"),
        ("train.momentum=nan", "train.momentum = nan: expected"),
        ("train.lr_decay=1.5", "train.lr_decay = 1.5: expected less than or equal to 1"),
        ("schedule.alpha=1", "schedule.alpha = 1: expected greater than 1"),
        ("schedule.kappa=often", "schedule.kappa = 'often': expected a valid integer"),
        ("schedule.ratio=1.1", "schedule.ratio = 1.1: expected less than or equal to 1"),
        ("hessian.tol=1", "hessian.tol = 1: expected less than 1"),
        ("checkpoint.keep=1", "checkpoint.keep = 1: expected greater than or equal to 2"),
        ("train.drop_last=1", "train.drop_last = 1: expected true or false"),
        ("launch.launcher=ssh", "launch.launcher = 'ssh': expected 'mpirun', 'horovodrun', "),
        ("launch.hosts=a:4,b:x", "launch.hosts = 'a:4,b:x': expected host or host:slots, sep"),
        ("launch.hosts=a,", "launch.hosts = 'a,': expected host or host:slots"),
        # Combinations
        (
            "schedule.base_batch=33",
            "schedule.base_batch = 33: expected a multiple of train.microbatch = 32",
        ),
        (
            "schedule.max_batch=100",
            "schedule.max_batch = 100: expected a multiple of train.microbatch = 32",
        ),
        (
            "schedule.method=gns",
            "schedule.base_batch = 32: expected at least two microbatches of 32",
        ),
        (
            "train={epochs=4, microbatch=32, lr=1, milestones=[2], annealing='cosine'}",
            "train.milestones = [2]: expected none with annealing = 'cosine'",
        ),
        ("schedule.max_batch=16", "schedule.max_batch = 16: expected at least base_batch = 32"),
        ("train.milestones=[3, 2]", "train.milestones = [3, 2]: expected increasing epochs"),
        ("train.milestones=[2, 2]", "train.milestones = [2, 2]: expected increasing epochs"),
        (
            "schedule.method=sgd",
            "schedule.method = 'sgd': expected one of abs, absa, absa-tuned, bl",
        ),
    ],
)
def test_errors_name_key_value_and_what_was_expected(override, line):
    assert refusal(override).startswith(f"job.toml: {line}")


def test_more_initial_ranks_than_the_maximum():
    assert refusal("ranks.initial=4", "ranks.max=2") == (
        "job.toml: ranks.max = 2: expected at least ranks.initial = 4"
    )


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("lr = 0.05", "", "train.lr: missing, expected a value"),
        ('name = "a"', "", "name: missing, expected a value"),
        ('method = "absa"', "", "schedule.method: missing, expected one of abs, absa, absa-tuned"),
        ('[data]\nname = "digits"', "", "data: missing, expected a value"),
        ("lr = 0.05", "lr = ", "not valid TOML: Invalid value (at line 10, column 6)"),
        ("[train]", "[train", "not valid TOML: "),
        ("lr = 0.05", "lr = 0.05\nlr = 0.1", "not valid TOML: Cannot overwrite a value"),
    ],
)
def test_a_missing_value_or_invalid_toml(old, new, line):
    assert refusal(text=JOB.replace(old, new)).startswith(f"job.toml: {line}")


def test_the_line_counts_the_other_errors():
    assert refusal("train.lr=0", "train.epochs=0", "seed=-1").endswith(" (and 2 more)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.write_bytes(b"name = '\xff'"), "utf-8"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, make, message):
    path = tmp_path / "job.toml"
    make(path)
    with pytest.raises(UsageError, match=f"job.toml: cannot be read as a job file: .*{message}"):
        config.load(path)


def test_a_file_of_an_editor_that_begins_it_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB, encoding="utf-8-sig")
    assert config.load(path) == parse()


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("train.lr=1e-3", "train.lr", 1e-3),
        (" train.epochs = 9 ", "train.epochs", 9),
        ("train.milestones=[1, 2]", "train.milestones", (1, 2)),
        ("name=plain", "name", "plain"),
        ("name = plain", "name", "plain"),
        ('name="a = b"', "name", "a = b"),
        ("name=a=b", "name", "a=b"),
        ("data.name=package.module:function", "data.name", "package.module:function"),
        ("data.root=/a/b c", "data.root", "/a/b c"),
        ("checkpoint.async=false", "checkpoint.background", False),
        ("launch.slurm.time=1:00:00", "launch.slurm.time", "1:00:00"),
        ("launch.slurm.time=04:00:00", "launch.slurm.time", "04:00:00"),
        ("launch.slurm.gpus-per-node=4", "launch.slurm.gpus_per_node", 4),
        ('launch.extra=["--x", "y"]', "launch.extra", ("--x", "y")),
    ],
)
def test_override(override, key, value):
    assert attrgetter(key)(parse(override)) == value


def test_the_last_override_of_a_key_wins():
    assert parse("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("override", ["seed", "=1", "train..lr=1", ".seed=1", "train.=1", ""])
def test_an_override_without_key_or_value(override):
    assert refusal(override) == (
        f"--set {override}: expected key=value, for example train.epochs=3"
    )


def test_an_override_below_a_value():
    assert refusal("train.lr.x=1") == "--set train.lr.x=1: lr is a value, expected a table"


def test_overrides_do_not_change_the_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    assert config.load(path, ("seed=5",)).seed == 5
    assert config.load(path).seed == 0


# Changes to the job of a run


@pytest.mark.parametrize(
    "override",
    [
        "name=b",
        "data.root=/elsewhere",
        "ranks.initial=2",
        "ranks.max=8",
        "ranks.microbatches_per_rank=2",
        "checkpoint.keep=5",
        "launch.launcher=srun",
        "launch.slurm.time=2:00",
        "train.device=cpu",
        "train.threads_per_rank=1",
    ],
)
def test_keys_without_effect_on_the_result_may_change(override):
    config.refuse_changes(parse(), parse(override), "D/job.toml", ())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed = 0 there, 1 here"),
        ("train.lr=0.1", "train.lr = 0.05 there, 0.1 here"),
        ("train.epochs=5", "train.epochs = 4 there, 5 here"),
        ("train.milestones=[1]", r"train.milestones = \(\) there, \(1,\) here"),
        ("train.reproducible=true", "train.reproducible = False there, True here"),
        ("schedule.kappa=3", "schedule.kappa = 10 there, 3 here"),
        ("hessian.every=9", "hessian.every = None there, 9 here"),
        ("data.name=cifar10", "data.name = 'digits' there, 'cifar10' here"),
        ("data.fold=2", "data.fold = None there, 2 here"),
        ("model.depth=20", "model.depth = None there, 20 here"),
        ("model.more={depth=20}", r"model.more.depth = None there, 20 here"),
    ],
)
def test_other_changes_are_refused_unless_allowed(override, message):
    saved, now, key = parse(), parse(override), message.split(" ")[0]
    with pytest.raises(UsageError, match=f"D/job.toml: .*{message}; .*--allow-changed {key}$"):
        config.refuse_changes(saved, now, "D/job.toml", ())
    with pytest.raises(UsageError):
        config.refuse_changes(saved, now, "D/job.toml", ("some.other",))
    config.refuse_changes(saved, now, "D/job.toml", (key,))


def test_the_microbatch_in_which_the_position_is_counted_cannot_change():
    refused = "train.microbatch = .*; use another --run-dir, or --fresh to start over$"
    for override in ("train.microbatch=8", "train.microbatch=16"):
        with pytest.raises(UsageError, match=refused):
            config.refuse_changes(parse(), parse(override), "D/job.toml", ("train.microbatch",))


@pytest.mark.parametrize("value", ["inf", "nan", "[1.0, inf, [nan]]", "{a = -inf}", "2026-01-01"])
def test_any_value_of_toml_reaches_the_ranks_as_an_argument(value):
    job = parse(f"model.more={value}")
    written = config.parse(config.dump(job), "D/job.toml")
    assert repr(written.model.arguments) == repr(job.model.arguments)
    config.refuse_changes(written, job, "D/job.toml", ())


def test_every_difference_is_named():
    with pytest.raises(UsageError, match=r"seed = 0 there, 1 here; train\.lr = 0\.05"):
        config.refuse_changes(parse(), parse("seed=1", "train.lr=1"), "D", ("train.epochs",))


def test_another_method_is_a_change():
    text = JOB.replace('"absa"', '"abs"')
    with pytest.raises(UsageError, match=r"schedule\.method = 'absa' there, 'abs' here"):
        config.refuse_changes(parse(), parse(text=text), "D", ())


# Old names of keys


@pytest.fixture(name="quiet")
def _quiet(monkeypatch):
    monkeypatch.setattr(file, "_warned", set())


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("train.remainder=drop", "train.drop_last", True),
        ("train.remainder=carry", "train.drop_last", False),
        ("train.clip_norm=0.5", "train.max_grad_norm", 0.5),
        ("train.decay_spares_vectors=true", "train.no_decay_norm_bias", True),
        ("launch.agent=rsh", "launch.rsh_agent", "rsh"),
        ("launch.silence_seconds=7.0", "launch.heartbeat_timeout", 7.0),
        ("launch.stuck_seconds=8.0", "launch.progress_timeout", 8.0),
        ("launch.slurm.prologue=site.sh", "launch.slurm.setup_script", "site.sh"),
        ("launch.slurm.lead=9", "launch.slurm.signal_seconds", 9),
    ],
)
def test_an_old_key_works_and_warns_once_with_the_new_name(quiet, capsys, old, new, value):
    for _ in range(2):
        job = config.load(DIGITS, (old,))
    assert attrgetter(new)(job) == value
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"{old.partition('=')[0]} is now called {new}" in warning
    assert config.parse(config.dump(job), "x") == job


def test_no_warning_of_old_keys_in_written_files_or_on_other_ranks(quiet, capsys, monkeypatch):
    config.load(DIGITS, ("train.clip_norm=0.5",), warn=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    config.load(DIGITS, ("train.clip_norm=0.5",))
    assert capsys.readouterr().err == ""


def test_both_names_of_a_key_are_refused():
    with pytest.raises(UsageError, match=r"train.clip_norm is the old name of train.max_grad_norm"):
        config.load(DIGITS, ("train.clip_norm=1.0", "train.max_grad_norm=1.0"))
    with pytest.raises(UsageError, match=r"remainder = 'keep': expected 'carry' \(now"):
        config.load(DIGITS, ("train.remainder=keep",))
    with pytest.raises(UsageError, match=r"remainder = \[1\]: expected 'carry' \(now"):
        config.load(DIGITS, ("train.remainder=[1]",))


def test_a_sweep_file_is_named_as_one(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('name = "x"\njob = "job.toml"\n[[grid]]\nschedule = ["bl"]\n')
    with pytest.raises(UsageError, match="a sweep file, expected a job file: hpc-absa compare"):
        config.load(path)
