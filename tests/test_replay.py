"""Decisions derived again from a log whose numbers were computed by hand."""

import json
import sys

import pytest

from hpc_absa import cli
from hpc_absa.errors import UsageError
from hpc_absa.replay import replay
from hpc_absa.rundir import RunDir

JOB = """\
name = "by hand"
[data]
name = "digits"
[model]
name = "digits-cnn"
[train]
epochs = 8
microbatch = 32
lr = 0.05
milestones = [5]
[schedule]
method = "abs"
base_batch = 32
max_batch = 256
kappa = 3
"""
WHOLE, COARSE = 128, 16
DECISIONS = [
    # λ, how it ended, samples, reference, action, next batch, next learning rate
    (40.0, "converged", WHOLE, None, "continue", 32, 0.05),
    (30.0, "stopped_above_threshold", WHOLE, 40.0, "continue", 32, 0.05),
    (18.0, "converged", WHOLE, 40.0, "grow", 64, 0.1),
    (7.0, "unfinished", WHOLE, 18.0, "continue", 64, 0.1),
    (25.0, "stopped_above_threshold", COARSE, 18.0, "continue", 64, 0.02),
    (15.0, "converged", WHOLE, 18.0, "grow", 128, 0.04),
    (7.0, "converged", WHOLE, 15.0, "grow", 256, 0.08),
    (None, "", 0, 7.0, "finish", 256, 0.08),
]


@pytest.fixture(name="run")
def _run(tmp_path):
    write(tmp_path, DECISIONS)
    return tmp_path


def write(path, decisions, job=JOB):
    (path / "job.toml").write_text(job)
    events = []
    for epoch, (value, ending, samples, reference, action, batch, lr) in enumerate(decisions, 1):
        events.append({"event": "epoch", "epoch": epoch, "step": 10 * epoch, "phase": 1})
        events.append(
            {
                "event": "decision", "epoch": float(epoch), "step": 10 * epoch, "phase": 1,
                "eigenvalue": value, "residual": 0.01, "converged": ending == "converged",
                "stopped_above_threshold": ending == "stopped_above_threshold",
                "matvecs": 3 if ending else 0,
                "hessian_samples": samples, "reference": reference, "action": action,
                "next_batch": batch, "next_lr": lr,
            }
        )  # fmt: skip
    RunDir(path).events.write_text("".join(json.dumps(event) + "\n" for event in events))


def at(replayed, epoch):
    return next(decision for decision in replayed.decisions if decision.epoch == epoch)


def test_its_own_parameters_lead_to_the_recorded_decisions(run):
    replayed = replay(run)
    assert not replayed.differing
    assert [decision.step for decision in replayed.decisions] == list(range(10, 90, 10))
    assert [decision.epoch for decision in replayed.growths] == [3, 6, 7]
    assert all(decision.unknown is None for decision in replayed.decisions)


def test_decisions_that_a_crash_undid_are_not_differences(run):
    log = RunDir(run).events
    lines = log.read_text().splitlines()
    undone = [line.replace('"grow"', '"continue"') for line in lines[4:6]]
    restart = json.dumps({"event": "phase_start", "step": 20, "phase": 1})
    log.write_text("\n".join([*lines[:4], *undone, restart, *lines[4:]]) + "\n")
    assert not replay(run).differing


@pytest.mark.parametrize(
    ("field", "value", "possible"),
    [
        (4, "continue", {3}),
        (5, 96, {3}),
        (6, 0.3, {3}),
        (3, 41.0, {3}),
        (0, 21.0, {3, 4, 5, 6, 7, 8}),  # no growth at λ 21 but by kappa; 21 is the reference
    ],
)
def test_a_wrong_recorded_decision_is_a_difference(tmp_path, field, value, possible):
    decisions = [list(row) for row in DECISIONS]
    decisions[2][field] = value
    write(tmp_path, decisions)
    differing = {decision.epoch for decision in replay(tmp_path).differing}
    assert 3 in differing or field == 0
    assert differing <= possible
    assert differing


def test_another_alpha_and_what_the_log_does_not_determine(run):
    replayed = replay(run, ["schedule.alpha=1.25"])
    assert at(replayed, 2).action == "continue"
    assert "λ is above 30; whether it is above 32 was not estimated" in at(replayed, 2).unknown
    assert at(replayed, 3).action == "grow"
    assert "λ is above 9; whether it is above 14.4 was not estimated" in at(replayed, 5).unknown
    stricter = replay(run, ["schedule.alpha=4", "schedule.kappa=10"])
    assert [decision.epoch for decision in stricter.growths] == [7]
    assert at(stricter, 2).unknown is None
    assert stricter.differing[0].epoch == 3


def test_a_smaller_kappa_needs_a_value_that_was_not_estimated(run):
    replayed = replay(run, ["schedule.kappa=2"])
    assert at(replayed, 2).action == "grow"
    assert at(replayed, 2).unknown == "λ is above 30; its value was not estimated"
    assert at(replayed, 3).reference == 40, "an unknown value does not become the reference"
    assert at(replayed, 5).action == "grow"
    assert at(replayed, 5).unknown == "λ is above 9; its value was not estimated"


def test_at_the_largest_batch_no_eigenvalue_was_estimated(tmp_path):
    rows = [*DECISIONS[:3], *[(None, "", 0, 18.0, "continue", 64, lr) for lr in (0.1, 0.02)]]
    write(tmp_path, rows, JOB.replace("256", "64"))
    assert not replay(tmp_path).differing
    replayed = replay(tmp_path, ["schedule.max_batch=128"])
    assert at(replayed, 4).unknown == "the run estimated no λ here"
    assert not replayed.differing


def test_a_rule_without_eigenvalues(tmp_path):
    rows = [(None, "", 0, None, "continue", 32, 0.05)] * 4
    rows += [(None, "", 0, None, "continue", 32, 0.05 * 0.2)] * 3
    job = JOB.replace('"abs"', '"bl"').replace("max_batch = 256\nkappa = 3\n", "")
    write(tmp_path, rows, job)
    assert not replay(tmp_path).differing
    growing = replay(tmp_path, ["schedule={method='gg', base_batch=32, max_batch=160}"])
    assert [(d.epoch, d.next_batch) for d in growing.growths] == [(5, 160)]


def test_the_gradient_noise_scale_is_read_from_the_log(tmp_path):
    rows = [(None, "", 0, None, "continue", 32, 0.05), (None, "", 0, None, "grow", 64, 0.1)]
    job = JOB.replace('"abs"', '"gns"').replace("kappa = 3\n", "").replace("= 32\nlr", "= 16\nlr")
    write(tmp_path, rows, job)
    log, scales = RunDir(tmp_path).events, [60.0, 70.0]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event, scale in zip(events[1::2], scales, strict=True):
        event |= {"gradient_noise": 2 * scale, "gradient_signal": 2.0, "noise_scale": scale}
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert not replay(tmp_path).differing
    assert [d.epoch for d in replay(tmp_path, ["schedule.gamma=2.0"]).growths] == [1, 2]
    adaptive = replay(tmp_path, ["schedule={method='abs', base_batch=32, max_batch=64}"])
    assert at(adaptive, 1).unknown == "the run estimated no λ here"


def test_a_run_that_estimated_eigenvalues_did_not_measure_gradient_noise(run):
    replayed = replay(run, ["schedule={method='gns', base_batch=64, max_batch=128}"])
    assert at(replayed, 1).unknown == "the run measured no gradient noise here"
    assert not replayed.growths


@pytest.mark.parametrize("change", ["train.epochs=3", "hessian.tol=0.1", "schedules.alpha=3"])
def test_a_change_that_affects_the_eigenvalues_is_refused(run, change):
    with pytest.raises(UsageError, match="a replay can change schedule"):
        replay(run, [change])


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hpc-absa", "replay", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def test_the_command(run, monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, run, "--alpha", "4", "--kappa", "10")
    assert status == 0
    assert "8 decisions, all as recorded." in out
    assert (
        "8 decisions, 6 different from the recorded ones, first at epoch 3: action continue" in out
    )
    status, out, _ = command(monkeypatch, capsys, run, "--json")
    result = json.loads(out)
    assert (status, result["agrees"], result["other"]) == (0, True, None)
    assert result["decisions"][2]["recorded"]["action"] == "grow"


def test_a_difference_has_exit_status_1(run, monkeypatch, capsys):
    job = RunDir(run).job
    job.write_text(job.read_text().replace("kappa = 3", "kappa = 2"))
    status, out, _ = command(monkeypatch, capsys, run)
    assert status == 1
    assert "first at epoch 2: action grow, recorded continue" in out
    status, out, _ = command(monkeypatch, capsys, run, "--json")
    assert (status, json.loads(out)["first_difference"]) == (1, 2)


def test_a_wrong_argument_is_reported_in_one_line(run, tmp_path, monkeypatch, capsys):
    status, out, err = command(monkeypatch, capsys, run, "--alpha", "0.5")
    assert (status, out) == (2, "")
    assert "schedule.alpha = 0.5: expected greater than 1" in err
    status, _, err = command(monkeypatch, capsys, tmp_path / "none")
    assert status == 2
    assert err.count("\n") == 1


def test_a_stored_job_without_the_key_was_run_with_a_reference_that_patience_resets(run):
    """Versions before the key existed; the job of a new run has every key."""
    recorded = replay(run)
    assert not recorded.differing
    kept = replay(run, ["schedule.reference_after_patience=keep"])
    assert kept.differing[0].epoch == 7
    assert at(kept, 7).reference == 18.0


def test_the_causes_of_growths(run):
    assert [decision.cause for decision in replay(run).growths] == [
        "eigenvalue", "patience", "eigenvalue"
    ]  # fmt: skip
    alone = replay(run, ["schedule.alpha=inf"])
    assert [(d.epoch, d.cause) for d in alone.growths] == [(3, "patience"), (6, "patience")]
    assert [d.epoch for d in replay(run, ["schedule.kappa=inf"]).growths] == [3, 7]


def test_steps_in_samples_use_the_recorded_number_of_training_samples(run):
    """Logs of earlier versions have none: the data set's own size is used then."""
    change = ["schedule={method='steps', base_batch=32, batches='3000:64'}"]
    assert [d.epoch for d in replay(run, change).growths] == [3]  # of 1437
    log = RunDir(run).events
    start = json.dumps({"event": "phase_start", "step": 0, "phase": 1, "training_samples": 600})
    log.write_text(start + "\n" + log.read_text())
    assert [d.epoch for d in replay(run, change).growths] == [5]
