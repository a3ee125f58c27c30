"""The talk's two tables to the digit, and the four formats of a table."""

import csv
import io
import math

import pytest

from hpc_absa.report.history import load
from hpc_absa.report.tables import (
    Column,
    Measured,
    RunResult,
    Table,
    accuracy_table,
    published_results,
    published_time_table,
    run_result,
    time_table,
)
from tests.report.synthetic import Log, whole_run


def row_of(markdown, label):
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in markdown.splitlines()]
    return next(line for line in lines if line[:1] == [label])


def test_published_accuracies():
    table = accuracy_table(published_results()).to_markdown()
    assert row_of(table, "batch")[1:3] == ["BL accuracy %", "BL # iter"]
    assert row_of(table, "128")[1:3] == ["83.05", "35156"]
    assert row_of(table, "640") == [
        *("640", "81.01", "7031", "84.59", "7031", "83.99", "16380"),
        *("83.30", "10578", "84.52", "9631"),
    ]
    assert row_of(table, "10240") == [
        *("10240", "68.75", "439", "30.99", "439", "83.68", "14400"),
        *("83.56", "5709", "84.29", "7491"),
    ]
    assert row_of(table, "16000")[-2:] == ["84.24", "5357"]


@pytest.mark.parametrize(
    ("label", "cells"),
    [
        ("BL", ["125073.0", "", "", "", "125073.0", "1.00×"]),
        ("GG", ["50965.0", "54.0", "40.0", "", "51059.0", "2.45×"]),
        ("ABSA", ["26404.0", "230.0", "95.0", "2746.0", "29475.0", "4.24×"]),
        ("ABSA tuned", ["13935.0", "58.0", "39.0", "220.0", "14252.0", "8.78×"]),
    ],
)
def test_published_times_totals_and_speed_ups(label, cells):
    assert row_of(published_time_table().to_markdown(), label)[1:] == cells


def test_mean_and_sample_deviation_over_seeds():
    results = [RunResult("bl", 128, seed, 0.80 + 0.02 * seed, 100) for seed in range(3)]
    table = accuracy_table(results)
    assert row_of(table.to_markdown(), "128")[1:] == ["82.00 ± 2.00", "100"]
    assert "3 seeds" in table.note
    head, row = csv.reader(io.StringIO(table.to_csv()))
    values = dict(zip(head, row, strict=True))
    assert float(values["BL accuracy % std"]) == pytest.approx(2.0)
    assert values["BL accuracy % n"] == "3"


def test_different_iterations_have_a_deviation():
    results = [RunResult("absa", 640, seed, 0.8, 100 + 10 * seed) for seed in range(2)]
    assert row_of(accuracy_table(results).to_markdown(), "640")[2] == "105 ± 7"


def test_failed_runs_are_left_out_and_counted_in_the_note():
    results = [RunResult("bl", 128, 0, 0.8, 100), RunResult("bl", 128, 1, math.nan, math.nan)]
    results += [RunResult("fb", 256, 0, math.nan, math.nan)]
    table = accuracy_table(results)
    assert row_of(table.to_markdown(), "128")[1] == "80.00"
    assert row_of(table.to_markdown(), "256")[1:] == ["", "", "", ""]
    assert "2 runs without a result" in table.note


def test_published_rows_follow_measured_ones():
    table = accuracy_table([RunResult("absa", 640, 0, 0.9, 5)], published=True)
    rows = [(row[0], row[1]) for row in table.rows]
    assert rows[:3] == [(128, "published"), (640, "measured"), (640, "published")]


def test_columns_are_in_the_order_of_the_talk_then_by_name():
    names = ("mine", "gns", "absa-tuned", "absa", "abs", "gg", "fb", "bl")
    table = accuracy_table([RunResult(name, 1, 0, 0.5, 1) for name in names])
    groups = list(dict.fromkeys(column.group for column in table.columns if column.group))
    assert groups == ["BL", "FB", "GG", "ABS", "ABSA", "ABSA tuned", "GNS", "mine"]


def test_times_add_up_with_a_column_for_the_rest(tmp_path):
    whole_run(tmp_path)
    history = load(tmp_path)
    table = time_table([run_result(history, 256, 0)])
    (row,) = table.rows
    heads = [column.name for column in table.columns]
    assert heads == [
        *("method", "comp", "comm", "resize", "Hessian"),
        *("adversarial", "rest", "total", "speed-up"),
    ]
    assert sum(row[1:7]) == pytest.approx(history.wall)
    assert row[8] == 1.0


def test_speed_up_against_the_mean_of_the_baseline():
    results = [
        RunResult("bl", 1, seed, 0.5, 1, {"comp": t}, t) for seed, t in enumerate((90.0, 110.0))
    ]
    results += [RunResult("absa", 1, 0, 0.5, 1, {"comp": 20.0, "hessian": 5.0}, 25.0)]
    table = time_table(results, published=True)
    assert row_of(table.to_markdown(), "ABSA")[-1] == "4.00×"
    assert row_of(table.to_markdown(), "BL")[-2] == "100.0 ± 14.1"
    assert row_of(table.to_markdown(), "ABSA tuned, published")[-1] == "8.78×"


def test_unfinished_run_has_no_result(tmp_path):
    Log(tmp_path).start().train_epoch(0.9)
    result = run_result(load(tmp_path), 32, 0)
    assert math.isnan(result.accuracy)
    assert math.isnan(result.iterations)


SPECIAL = Table(
    "A & B <i>",
    (Column("na|me"), Column("x", "g_1", 1), Column("y", "g_1", 2, "×")),
    (("a|b & 50 % <b>", 1.25, Measured(2.0, 0.5, 3)), ("", None, math.nan)),
    "note <script>",
)


def test_markdown_escapes_and_keeps_columns():
    lines = SPECIAL.to_markdown().splitlines()
    assert lines[0] == "**A & B &lt;i&gt;**"
    assert lines[2] == r"| na\|me | g_1 x | g_1 y |"
    assert lines[3] == "| :-- | --: | --: |"
    assert lines[4] == r"| a\|b & 50 % &lt;b&gt; | 1.2 | 2.00 ± 0.50× |"
    assert lines[5] == "|  |  |  |"


def test_latex_escapes_and_groups():
    latex = SPECIAL.to_latex()
    assert r"\caption{A \& B <i>}" in latex
    assert r"\multicolumn{2}{c}{g\_1}" in latex
    assert r"\cmidrule(lr){2-3}" in latex
    assert r"a|b \& 50 \% <b> & 1.2 & 2.00 $\pm$ 0.50$\times$ \\" in latex


def test_html_escapes():
    html = SPECIAL.to_html()
    assert "<b>" not in html
    assert "<script>" not in html
    assert '<th colspan="2" scope="colgroup">g_1</th>' in html


def test_csv_reads_back_in_full_precision():
    rows = list(csv.reader(io.StringIO(SPECIAL.to_csv())))
    assert rows[0] == ["na|me", "g_1 x", "g_1 y", "g_1 y std", "g_1 y n"]
    assert rows[1] == ["a|b & 50 % <b>", "1.25", "2.0", "0.5", "3"]
    assert rows[2] == ["", "", "", "", ""]
    assert set(SPECIAL.formats()) == {"md", "csv", "tex", "html"}


def test_rows_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        Table("t", (Column("a"), Column("b")), (("x",),))
