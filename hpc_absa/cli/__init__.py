"""The commands. Heavy imports stand inside each, so that `status` and errors answer in a blink."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hpc_absa import __version__
from hpc_absa.cli import looking, preparing, running
from hpc_absa.errors import ExitStatus, HpcAbsaError

PANELS: dict[str, list[Callable[..., int | None]]] = {
    "Train": [running.run, running.compare, running.cancel],
    "Look at a run": [
        looking.status,
        looking.report,
        looking.replay,
        looking.verify,
        looking.spectrum,
    ],
    "Before a run": [preparing.plan, preparing.data, preparing.doctor],
    "What launchers start": [running.train, running.link],
}

app = typer.Typer(
    name="hpc-absa",
    help="Train with Horovod over MPI: start small, watch the Hessian, grow batch and ranks.",
    epilog="Begin with: hpc-absa run jobs/digits.toml",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"hpc-absa {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitStatus.USAGE)


_ClickError: Any = typer.BadParameter.__mro__[2]
"""Base of usage errors, from click or, in newer releases of Typer, from its own copy of click."""


def main() -> None:
    """The console script: turns every error of a user's into one line and its exit status."""
    try:
        status = app(standalone_mode=False)
    except HpcAbsaError as error:
        print(f"hpc-absa: {error}", file=sys.stderr)
        status = error.status
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        print(f"hpc-absa: {error.format_message()}{hint}", file=sys.stderr)
        status = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        status = ExitStatus.STOPPED
    except BrokenPipeError:
        sys.stderr.close()
        status = ExitStatus.FAILED
    except OSError as error:  # a disk that is full, read-only or gone
        print(f"hpc-absa: {error}", file=sys.stderr)
        status = ExitStatus.FAILED
    sys.exit(int(status or 0))
