"""The commands. They import what they need when called, so that help and errors are immediate."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hpc_absa import __version__, console
from hpc_absa.cli import inspecting, listing, models, planning, preparing, running, studying
from hpc_absa.errors import ExitStatus, HpcAbsaError

PANELS: dict[str, list[Callable[..., int | None]]] = {
    "Train": [running.run, running.launch, running.compare, running.cancel],
    "Inspect a run": [
        inspecting.status,
        listing.list_runs,
        inspecting.report,
        inspecting.serve,
        inspecting.replay,
        inspecting.verify,
    ],
    "Study a model": [
        inspecting.spectrum,
        studying.attack,
        studying.quantize,
        studying.analyse,
    ],
    "Before a run": [models.init, planning.plan, preparing.data, preparing.doctor],
    "After a run": [models.evaluate, models.export],
    "Started by launchers": [running.train, running.link],
}

app = typer.Typer(
    name="hpc-absa",
    help="Train with Horovod over MPI; batch and ranks grow as the Hessian's eigenvalue falls.",
    epilog="Start with: hpc-absa run jobs/digits.toml",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, commands in PANELS.items():
    for command in commands:
        # the options of the user's own command are not ours, also where `--` was forgotten
        context = {"allow_interspersed_args": command is not running.launch}
        name = "list" if command is listing.list_runs else None
        app.command(name, rich_help_panel=panel, context_settings=context)(command)


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
"""Base of usage errors: click's, or in newer releases of Typer that of its own copy of click."""


def main() -> None:
    """The console script: an error becomes one line and the exit status."""
    console.prepare()
    try:
        status = app(standalone_mode=False)
    except HpcAbsaError as error:
        _print_error(f"hpc-absa: {error}")
        status = error.status
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        _print_error(f"hpc-absa: {error.format_message()}{hint}")
        status = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        status = ExitStatus.STOPPED
    except BrokenPipeError:
        status = ExitStatus.FAILED
    except OSError as error:  # such as a full or read-only disk
        _print_error(f"hpc-absa: {error}")
        status = ExitStatus.FAILED
    if not console.finish(sys.stdout):  # only where the output is the result
        status = status or ExitStatus.FAILED
    console.finish(sys.stderr)
    sys.exit(int(status or 0))


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
