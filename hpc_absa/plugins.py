"""User-defined code by name: `"package.module:function"` for data, models, losses, schedules."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_absa.errors import HpcAbsaError, UsageError


def is_reference(name: str) -> bool:
    """Whether `name` refers to user-defined code rather than something built in."""
    return ":" in name


def resolve(reference: str, key: str) -> Callable[..., Any]:
    """The function or class that `"package.module:name"` refers to.

    Modules are searched on Python's path, and last in the current folder.

    Args:
        reference: `"package.module:name"`; `name` may have dots.
        key: Of the job file, for error messages: `"model.name"`.

    Raises:
        UsageError: No such module, an error during its import, no such name in it, or an object
            that cannot be called.
    """
    module_name, _, attribute = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise UsageError(f'{key}: "{reference}" is not of the form "package.module:function"')
    target: Any = _module(module_name, key)
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise UsageError(
                f'{key}: module "{module_name}" has no "{attribute}"'
                + suggestion(part, [name for name in dir(target) if not name.startswith("_")])
            )
        target = getattr(target, part)
    if not callable(target):
        raise UsageError(
            f'{key}: "{reference}" is of type {type(target).__name__}, expected something callable'
        )
    return target


def call(
    function: Callable[..., Any],
    key: str,
    arguments: Mapping[str, Any],
    offered: Mapping[str, Any],
    title: str = "",
) -> Any:
    """Call `function` with all of `arguments`, and with those of `offered` that it takes.

    Args:
        function: What `resolve` returned, or a built-in one.
        key: For error messages: `"model"`.
        arguments: From the job file; each must be a parameter of `function`.
        offered: Passed if the signature takes them and `arguments` does not have them.
        title: The function's name in messages; `__name__` if empty.

    Raises:
        UsageError: An argument that the function does not take (the message lists those it does),
            or a missing one; or the function itself failed, if it is not one of this package.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
        return function(**arguments)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {
        name: p
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    title = title or getattr(function, "__name__", repr(function))
    for name in arguments:
        if name not in named and not takes_any:
            valid = valid_ones(named.keys() - offered.keys())
            raise UsageError(f"{key}.{name}: {title} has no such argument; {valid}")
    given = {name: value for name, value in offered.items() if name in named or takes_any}
    given.update(arguments)
    for name, p in named.items():
        if name not in given and p.default is p.empty:
            raise UsageError(f"{key}.{name}: {title} needs this argument, and it is not given")
    if not is_reference(title) and str(getattr(function, "__module__", "")).startswith("hpc_absa"):
        return function(**given)
    with user_code(f"{key}: {title}"):
        return function(**given)


@contextmanager
def user_code(what: str, hint: str = "") -> Iterator[None]:
    """Turn what a user's code raises into one line.

    Raises:
        UsageError: `what` failed, with the error and the place in the user's code.
    """
    try:
        yield
    except HpcAbsaError:
        raise
    except Exception as error:
        raise UsageError(
            f"{what} failed: {described(error)}" + (f"; {hint}" if hint else "")
        ) from error


def described(error: BaseException) -> str:
    """One line: the error, and the innermost line of code that is neither ours nor a library's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TorchScript names the cause in the last line
    line = lines[-1 if "TorchScript" in lines[0] else 0] if lines else ""
    message = f"{type(error).__name__}: {line}" if line else type(error).__name__
    if isinstance(error, HpcAbsaError):
        message = line
    ours = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((ours, sys.prefix, sys.base_prefix, "<")):
            return f"{message} ({frame.filename}:{frame.lineno})"
    return message


def valid_ones(names: Iterable[str]) -> str:
    """The end of a message about an unknown argument."""
    listed = ", ".join(sorted(names))
    return f"valid ones: {listed}" if listed else "it takes none"


def suggestion(name: str, known: Iterable[str], count: int = 3) -> str:
    """The end of a message about an unknown name: similar ones, or a full stop."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else "."


def _module(name: str, key: str) -> Any:
    folder = str(Path.cwd())
    # A console script does not have the current folder on its path, as `python -m` has.
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UsageError(
                f'{key}: no module "{error.name}" in {folder} or on PYTHONPATH'
            ) from error
        raise UsageError(f'{key}: module "{name}" needs a missing module: {error}') from error
    except Exception as error:
        raise UsageError(
            f'{key}: importing module "{name}" failed: {type(error).__name__}: {error}'
        ) from error
