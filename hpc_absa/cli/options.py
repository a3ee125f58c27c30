"""Arguments and options that several commands have, and how commands print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option


def folder(text: str) -> Path:
    """The value of an option; an empty one comes from a shell variable that is not set."""
    if not text.strip():
        raise typer.BadParameter("it is empty, expected a folder")
    return Path(text)


JobFile = Annotated[Path, Argument(metavar="JOB", help="Job file (TOML); jobs/ has examples.")]
Directory = Annotated[Path, Argument(metavar="D", help="Run directory.")]
RunFolder = Annotated[
    Path | None,
    Option("--run-dir", parser=folder, metavar="D", help="Run directory; default runs/NAME."),
]
Overrides = Annotated[
    list[str] | None,
    Option(
        "--set", metavar="KEY=VALUE", help="Override a key, e.g. --set train.epochs=3; repeatable."
    ),
]
AllowChanged = Annotated[
    list[str] | None,
    Option(
        metavar="KEY", help="Continue although this key differs from the run's job; repeatable."
    ),
]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]
MaxRanks = Annotated[
    int | None,
    Option(min=1, help="Largest number of ranks, in place of the job's ranks.max."),
]


def print_json(value: dict[str, Any]) -> None:
    """One object on one line; NaN, which JSON does not have, is an error."""
    print(json.dumps(value, allow_nan=False))


def print_line(line: str) -> None:
    """Print a line immediately, also into a pipe."""
    print(line, flush=True)
