"""What several commands take and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

JobFile = Annotated[
    Path, typer.Argument(metavar="JOB", help="Job file (TOML); jobs/ has examples.")
]


def folder(text: str) -> Path:
    """The folder that an option names; an empty one is a variable that was not set."""
    if not text.strip():
        raise typer.BadParameter("it is empty, expected a folder")
    return Path(text)


RunFolder = Annotated[
    Path | None,
    typer.Option("--run-dir", parser=folder, metavar="D", help="Run directory; default runs/NAME."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, e.g. --set train.epochs=3; repeatable."
    ),
]
AllowChanged = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="Go on though this key differs from the run begun; repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
MaxRanks = Annotated[
    int | None,
    typer.Option(min=1, help="Largest number of ranks, in place of the job's ranks.max."),
]


def print_json(value: dict[str, Any]) -> None:
    """One object on a line, without NaN, which is no JSON."""
    print(json.dumps(value, allow_nan=False))


def say(line: str) -> None:
    """A line for people, at once."""
    print(line, flush=True)
