"""The page is valid, self-contained and complete; so are the figures."""

import base64
import gzip
import json
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from hpc_absa.cli import inspecting
from hpc_absa.errors import UsageError
from hpc_absa.report import figures
from hpc_absa.report.compare import comparison, folded, run_dirs
from hpc_absa.report.curves import curves, groups
from hpc_absa.report.history import load
from hpc_absa.report.page import headline, page, write_report
from hpc_absa.report.tensorboard import TensorBoardLog
from hpc_absa.report.timing import CATEGORIES
from hpc_absa.rundir.files import require_replaceable
from tests.report.synthetic import JOB, Log, whole_run

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags, addresses and text, and every unbalanced tag."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.wrong, self.addresses, self.tags, self.text = [], [], [], [], []
        self.scripts = {}
        self.feed(source)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts[dict(attrs).get("type", "text/javascript")] = ""
        named = {"src", "srcset", "href", "xlink:href", "data", "action", "poster"}
        self.addresses += [value for name, value in attrs if name in named]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[[*self.scripts][-1]] += data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One report, written once: drawing takes most of the time of these tests."""
    folder = tmp_path_factory.mktemp("whole")
    whole_run(folder)
    return folder, write_report([folder])


def size_of(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_default_paths_are_in_the_run_directory(whole):
    folder, paths = whole
    assert (paths.html, paths.png) == (folder / "report.html", folder / "report.png")
    assert sorted(p.name for p in folder.iterdir()) == [
        *("events.jsonl", "job.toml", "report.html", "report.png")
    ]


def test_page_is_valid_and_loads_nothing(whole):
    source = whole[1].html.read_text()
    parsed = Page(source)
    assert parsed.wrong == []
    assert parsed.addresses == []
    assert not {"link", "iframe", "object", "img"} & set(parsed.tags)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "default-src &#39;none&#39;" in source
    assert len(source) < 1_000_000


def test_each_category_of_seconds_has_a_colour(whole):
    source = whole[1].html.read_text()
    assert [key for key in CATEGORIES if f".c-{key} {{ background: " not in source] == []


def test_page_has_its_libraries_and_the_curves(whole):
    scripts = Page(whole[1].html.read_text()).scripts
    library = gzip.decompress(base64.b64decode(scripts["application/gzip"]))
    assert b"Bokeh" in library
    curves = json.loads(scripts["application/json"])
    (run,) = curves["runs"]
    indices, values = run["y"]["test_accuracy"]
    assert [run["x"]["epoch"][i] for i in indices] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert values == [71, 83, 88, 91, 93, 94.5, 96.8, 97.4]
    assert set(curves["axes"]) == set(run["x"])


def test_page_has_results_decisions_failures_and_job(whole):
    text = " ".join(Page(whole[1].html.read_text()).text)
    assert "97.40 %" in text
    assert "ABSA: 97.40 % test accuracy after 8 epochs and 186 steps in 51.1 s" in text
    assert "λ 19 against 42: batch 32 → 64" in text
    assert "(not converged)" in text
    assert "killed by signal 9" in text
    assert 'method = "absa"' in text
    assert "Horovod over MPI" in text
    assert "lost to failures" in text


def test_image_has_both_figures_and_the_expected_size(whole):
    folder, paths = whole
    width, height = size_of(paths.png.read_bytes())
    inches = figures.TRAINING_HEIGHT + figures.seconds_height([load(folder)])
    assert width == round(130 * figures.WIDTH)
    assert height == pytest.approx(130 * inches, abs=2)
    assert paths.png.stat().st_size > 50_000


def test_text_of_the_user_is_escaped(tmp_path):
    job = JOB.replace('"digits"', '"<script>alert(1)</script> $x^{$"') + '# </pre><b onload="x">\n'
    log = Log(tmp_path / "a", job).start(hosts=["<i>host"], backend="<u>", device="<s>")
    log.train_epoch().decide(3.0, reason="<img src=http://evil.example/x>", action="<q>")
    log.event("failure", reason="</table><script>", rank=0, host="<em>", exit_code=1)
    source = page([load(log.path)])
    parsed = Page(source)
    assert parsed.wrong == []
    assert not {"u", "s", "q", "em"} & set(parsed.tags)
    assert "alert(1)" not in parsed.scripts["text/javascript"]
    assert "img" not in parsed.tags
    assert parsed.tags.count("script") == 4
    assert "<script>alert(1)</script>" in "".join(parsed.text)


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda log: log, "the run never started"),
        (lambda log: log.event("epoch", epoch=1, test_accuracy=0.5), "No phase has started"),
    ],
)
def test_page_of_a_run_without_phases(tmp_path, write, text):
    write(Log(tmp_path))
    parsed = Page(page([load(tmp_path)]))
    assert parsed.wrong == []
    assert text in " ".join(parsed.text)


def test_several_runs_in_one_page(tmp_path):
    whole_run(tmp_path / "one")
    second = JOB.replace("absa", "bl").replace("digits", "other")
    Log(tmp_path / "two", second).start().train_epoch(0.5).cut_short()
    parsed = Page(page([load(tmp_path / "one"), load(tmp_path / "two")]))
    assert parsed.wrong == []
    text = " ".join(parsed.text)
    assert "2 runs" in text
    assert "unfinished" in text
    assert "speed-up" in text
    assert len(json.loads(parsed.scripts["application/json"])["runs"]) == 2


def test_output_path(tmp_path):
    Log(tmp_path / "run").start()
    paths = write_report([tmp_path / "run"], tmp_path / "deep" / "x.html")
    assert "No epoch has been finished" in paths.html.read_text()
    assert size_of(paths.png.read_bytes())[0] == 1170
    assert (paths.html, paths.png) == (tmp_path / "deep/x.html", tmp_path / "deep/x.png")


@pytest.mark.parametrize("name", ["x.html", "x.png"])
def test_a_file_of_the_users_is_not_replaced(tmp_path, name):
    Log(tmp_path / "run").start()
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name}: exists and is not of hpc-absa"):
        write_report([tmp_path / "run"], tmp_path / "x.html")
    assert (tmp_path / name).read_text() == "mine"


def test_an_earlier_report_is_replaced_also_its_image_alone(whole, monkeypatch):
    folder, paths = whole
    monkeypatch.setattr(figures, "png", lambda histories: paths.png.read_bytes())
    source = paths.html.read_text()
    write_report([folder])
    paths.html.unlink()
    write_report([folder])
    paths.html.write_text(source)


def test_a_run_in_a_folder_that_cannot_be_written_has_its_page_elsewhere(tmp_path, monkeypatch):
    def refuse(log):
        raise PermissionError(13, "Permission denied", "tensorboard")

    monkeypatch.setattr(TensorBoardLog, "close", refuse)
    Log(tmp_path / "run").start()
    assert inspecting.report([tmp_path / "run"], tmp_path / "x.html") == 0
    assert (tmp_path / "x.html").exists()


def test_headline_of_an_unfinished_run(tmp_path):
    Log(tmp_path).start().train_epoch(0.5).train_epoch(0.625)
    assert headline(load(tmp_path)) == (
        "ABSA: unfinished, 62.50 % test accuracy after 2 of 8 epochs and 100 steps in 8.0 s; "
        "ranks 1, global batch 32"
    )


def test_headline_without_an_accuracy_has_the_first_metric(tmp_path):
    log = Log(tmp_path).start()
    log.train_epoch(math.nan, metrics={"perplexity": 12.5, "accuracy per token": 0.25})
    history = load(tmp_path)
    assert "12.5 test perplexity after 1 of 8 epochs" in headline(history)
    panels = curves({"run": history}, {})["panels"]
    assert panels["metrics.perplexity"]["title"] == "Test perplexity"


def test_not_a_run_directory_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"neither job\.toml nor events\.jsonl"):
        write_report([tmp_path])
    with pytest.raises(UsageError, match="no run directory"):
        write_report([])
    assert list(tmp_path.iterdir()) == []


def test_threshold_and_growth_points_are_drawn(tmp_path):
    whole_run(tmp_path)
    figure = figures.draw([load(tmp_path)], ["training"])
    panel = next(ax for ax in figure.axes if "eigenvalue" in ax.get_title(loc="left"))
    assert panel.get_yscale() == "log"
    names = panel.get_legend_handles_labels()[1]
    assert any(name.startswith("growth threshold") for name in names)
    (grown,) = [c for c in panel.collections if c.get_label() == "λ, batch grows"]
    assert [tuple(point) for point in grown.get_offsets()] == [(2, 19.0), (4, 8.1), (6, 3.9)]
    threshold = next(line for line in panel.lines if "threshold" in str(line.get_label()))
    assert max(threshold.get_ydata()) == 21.0


def test_a_loss_that_becomes_negative_is_drawn_on_a_linear_axis(tmp_path):
    log = Log(tmp_path).start()
    for loss in (1.0, -0.5, -2.0):
        log.train_epoch(train_loss=loss, test_loss=loss)
    history = load(tmp_path)
    figure = figures.draw([history], ["training"])
    panel = next(ax for ax in figure.axes if "Loss" in ax.get_title(loc="left"))
    assert panel.get_yscale() == "linear"
    assert list(panel.lines[0].get_ydata()) == [1.0, -0.5, -2.0]
    assert curves({"run": history}, {})["panels"]["loss"]["scale"] == "linear"


def test_repeated_decisions_without_an_estimate_are_one_row(tmp_path):
    log = Log(tmp_path).start()
    for _ in range(5):
        log.train_epoch().decide(math.nan, matvecs=0, reason="batch is at its maximum 128")
    rows = folded(load(tmp_path).decisions)
    assert [(first.epoch, last.epoch) for first, last in rows] == [(1, 5)]
    assert page([load(tmp_path)]).count('<td class="why">batch is at its maximum 128') == 1


def test_keys_that_differ_are_columns_and_the_seed_makes_a_group(tmp_path):
    for seed, alpha in ((0, 2.0), (1, 2.0), (0, 4.0)):
        job = JOB.replace("seed = 0", f"seed = {seed}").replace("alpha = 2.0", f"alpha = {alpha}")
        name = f"absa-{alpha:g}-seed{seed}"
        Log(tmp_path / name, job.replace('"digits"', f'"{name}"')).start().train_epoch()
    paths = run_dirs([tmp_path])
    runs = [(path.name, load(path)) for path in paths]
    table = comparison(runs, {"absa-2-seed0": "running"})
    names = [column.name for column in table.columns]
    assert names[:4] == ["run", "schedule", "seed", "schedule.alpha"]
    assert [row[2:5] for row in table.rows] == [
        *((0, 2.0, "running"), (1, 2.0, "unfinished"), (0, 4.0, "unfinished"))
    ]
    assert groups(dict(runs)) == {
        **{"absa-2-seed0": "absa-2", "absa-2-seed1": "absa-2"},
        **{"absa-4-seed0": "absa-4-seed0"},
    }
    assert write_report([tmp_path]).html == tmp_path / "report.html"


def test_figures_for_papers(tmp_path):
    whole_run(tmp_path / "run")
    written = figures.save([load(tmp_path / "run")], tmp_path / "figures")
    assert {path.name for path in written} == {
        f"{name}.{kind}" for name in ("training", "seconds", "talk") for kind in figures.FORMATS
    }
    for path in written:
        begin = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}[path.suffix[1:]]
        assert path.read_bytes().startswith(begin)
        require_replaceable(path)  # by the next ones


@pytest.mark.parametrize("name", ["training.pdf", "talk.svg", "scalars.csv"])
def test_figures_and_tables_do_not_replace_a_file_of_the_users(tmp_path, name):
    Log(tmp_path / "run").start()
    (tmp_path / name).write_text("mine")
    out, table = tmp_path / "page.html", tmp_path / "scalars.csv"
    with pytest.raises(UsageError, match=f"{name}: exists and is not of hpc-absa"):
        inspecting.report([tmp_path / "run"], out, tmp_path, table)
    assert (tmp_path / name).read_text() == "mine"
    assert not out.exists()


def test_the_image_of_thousands_of_phases_is_not_too_high(tmp_path):
    whole_run(tmp_path)
    history = load(tmp_path)
    many = replace(history, phases=history.phases * 1000)
    assert figures.TRAINING_HEIGHT + figures.seconds_height([many]) < 2**16 / 300
    assert figures.seconds_height([history]) < figures.TRAINING_HEIGHT


def test_no_slow_imports_before_a_figure_is_drawn():
    code = (
        "import sys, hpc_absa.report.page, hpc_absa.report.tables\n"
        "names = ('matplotlib', 'numpy', 'torch', 'mpi4py', 'bokeh')\n"
        "print([name for name in names if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.sub(r"\s", "", out.stdout) == "[]"
