"""Hooks of MkDocs: pages made from the code, and files of the repository outside of `docs/`."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    **{
        (place := p.relative_to(ROOT).as_posix()): place
        for pattern in ("benchmarks/*.md", "benchmarks/results/*.md")
        for p in ROOT.glob(pattern)
    },
    **{f"examples/{p.name}": f"examples/{p.stem}.md" for p in ROOT.glob("examples/*.py")},
    **{
        (place := p.relative_to(ROOT).as_posix()): f"sources/{place.removesuffix('.py')}.md"
        for p in ROOT.glob("benchmarks/**/*.py")
    },
}
"""Files outside of `docs/` (from the root) that are pages of the site; `index.md` is not copied."""
TABLES = ("data", "model", "train", "loss", "optimizer", "hessian", "ranks", "checkpoint", "launch")


def site_path(path: str) -> str | None:
    """The page, from the site's root, of a file of the repository; None: it is not on the site."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def repository_path(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    made = {target: source for source, target in OUTSIDE.items() if target != "index.md"}
    return made.get(page, f"docs/{page}")


def relink(markdown: str, page: str) -> str:
    """The page's links between files of the repository as links between pages of the site."""
    folder = posixpath.dirname(repository_path(page))

    def target(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        found = site_path(posixpath.normpath(posixpath.join(folder, path)))
        if found is None:
            return match[0]
        relative = posixpath.relpath(found, posixpath.dirname(page) or ".")
        return f"]({relative}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", target, markdown)


# Pages made from the code


def docstrings(model: type) -> dict[str, str]:
    """The docstrings below the fields of a class and of those that it extends."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not cls.__module__.startswith("hpc_absa"):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        for field, below in itertools.pairwise(getattr(definition, "body", [])):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = " ".join(text.split())
    return found


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema of one value in words."""
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "anyOf" in schema:
        kinds = [type_of(kind) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    kind = {"integer": "integer", "number": "number", "boolean": "true or false", "array": "list"}
    text = kind.get(schema.get("type", ""), "text")
    limits = (
        ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")
    )  # fmt: skip
    shown = [f"{sign} {schema[key]:g}" for key, sign in limits if schema.get(key, 2**63) < 2**63]
    return ", ".join([text, *shown])


def rows(model: Any, skip: tuple[str, ...] = ()) -> list[str]:
    """A row of each key of a table: name, type, default, meaning."""
    schema, texts = model.model_json_schema(by_alias=True), docstrings(model)
    fields = {field.alias or name: name for name, field in model.model_fields.items()}
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, value in schema["properties"].items():
        if "$ref" in value or key in skip:
            continue
        default = "required" if key in schema.get("required", ()) else "not set"
        if value.get("default") is not None:
            default = f"`{json.dumps(value['default'], ensure_ascii=False)}`"
        meaning = texts.get(fields[key], "").replace("|", "\\|")
        lines.append(f"| `{key}` | {type_of(value)} | {default} | {meaning} |")
    return lines


def job_keys() -> str:
    """The page of all keys of a job file."""
    from hpc_absa.config import tables
    from hpc_absa.schedules import SCHEDULES

    lines = [
        "# Every job key",
        "",
        "This page is made from the code that reads job files. [Job file](job-file.md) has the",
        "same keys with units, origins and explanations.",
        "",
        "[job.schema.json](job.schema.json) is the same as a JSON schema, with which an editor",
        "completes and checks keys. For the TOML extensions of VS Code, Zed and Neovim (taplo) the",
        "first line of a job file names it:",
        "",
        "```toml",
        "#:schema ./job.schema.json",
        "```",
        "",
        "## Top level",
        "",
        *rows(tables.Job, skip=("data", "model", "train", "schedule")),
    ]
    for key in TABLES:
        model = tables.Job.model_fields[key].annotation
        lines += ["", f"## `[{key}]`", "", inspect.getdoc(model) or "", ""]
        keys = rows(model)
        if len(keys) > 2:
            lines += keys
    lines += ["", "## `[launch.slurm]`", "", *rows(tables.SlurmOptions)]
    for method, schedule in SCHEDULES.items():
        lines += ["", f'## `[schedule]` with `method = "{method}"`', ""]
        lines += [inspect.getdoc(schedule) or "", "", *rows(schedule)]
    return "\n".join(lines) + "\n"


def job_schema() -> str:
    """The JSON schema of a job file."""
    from hpc_absa.config import Job

    schema = Job.model_json_schema(by_alias=True)
    for section in schema.get("$defs", {}).values():
        section.pop("title", None)
    draft = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps({"$schema": draft, **schema}, indent=1)


def commands() -> str:
    """The page of all commands with their options."""
    import typer

    from hpc_absa import cli

    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines = ["# Every command", "", "This page is what `hpc-absa COMMAND --help` prints.", ""]
    for name, command in known.items():
        words = [
            parameter.metavar or parameter.name.upper()
            for parameter in command.params
            if parameter.param_type_name == "argument"
        ]
        lines += [f"## {name}", "", f"`hpc-absa {' '.join([name, '[OPTIONS]', *words])}`", ""]
        lines += [inspect.cleandoc(command.help or ""), ""]
        lines += ["| argument or option | meaning |", "| --- | --- |"]
        for parameter in command.params:
            names = ", ".join(f"`{option}`" for option in parameter.opts + parameter.secondary_opts)
            if parameter.param_type_name == "argument":
                names = f"`{parameter.metavar or parameter.name.upper()}`"
            meaning = " ".join((parameter.help or "").split()).replace("|", "\\|")
            lines.append(f"| {names} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def example(path: Path) -> str:
    """The page of a program."""
    return f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"


def pages() -> dict[str, Any]:
    """What is added to `docs/`: functions that return the contents, by place in the site."""
    found: dict[str, Any] = {
        "job-keys.md": job_keys,
        "job.schema.json": job_schema,
        "commands.md": commands,
    }
    for source, target in OUTSIDE.items():
        if source.endswith(".py"):
            found[target] = functools.partial(example, ROOT / source)
        elif target != "index.md":
            found[target] = functools.partial((ROOT / source).read_text, encoding="utf-8")
    return found


# What MkDocs calls


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for place, content in pages().items():
        files.append(File.generated(config, place, content=content()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return relink(markdown, page.file.src_uri)
