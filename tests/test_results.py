"""What the benchmarks write."""

import json
import sys

from benchmarks.results import Command, Comparison, Measure, options, write


def test_contenders_run_in_turns_and_one_that_fails_is_named(tmp_path, capsys):
    order = []

    def contender(name, *values):
        values = iter(values)

        def run():
            order.append(name)
            return {"speed": next(values), "weights": "same bits"}

        return run

    table = Comparison(
        "two ranks", {"speed": Measure("samples/s", "higher"), "weights": Measure("")}, "ours"
    )
    command = Command([sys.executable, "-c", "print('{\"speed\": 10.0}')"])
    broken = Command([sys.executable, "-c", "raise ValueError('no')"])
    contenders = {"ours": contender("ours", 0, 20, 24, 22), "slow": contender("slow", 0, 10, 8, 11)}
    table.run({**contenders, "command": command, "broken": broken}, 3)
    assert order == ["ours", "slow", "ours", "slow", "slow", "ours", "ours", "slow"]
    assert table.samples["ours"]["speed"] == [20, 24, 22], "without the first"
    assert table.samples["command"]["speed"] == [10, 10, 10]
    assert table.best_other("speed") == ("slow", 2.0), "the median of the quotients of the rounds"
    assert table.ratio("slow", "ours", "weights") is None

    write("example", [table], options("").parse_args(["--out", str(tmp_path)]))
    text = (tmp_path / "example.md").read_text()
    assert "| | speed, samples/s | × ours | weights |" in text
    assert "| ours | 22 (20 to 24) | 1.00 | same bits |" in text
    assert "| slow | 10 (8 to 11) | 0.50 | same bits |" in text
    assert "- broken: no result: RuntimeError: exit status 1: ValueError: no" in text
    content = json.loads((tmp_path / "example.json").read_text())
    assert content["comparisons"][0]["summary"]["ours"]["speed"]["range"] == [20, 24]
    assert content["about"]["cores"]
    index = (tmp_path / "README.md").read_text()
    assert "- two ranks: ours: speed 22 samples/s, 2.00 × as good as slow" in index
    write("example", [table], options("").parse_args(["--quick", "--out", str(tmp_path)]))
    assert (tmp_path / "quick/example.md").exists()
