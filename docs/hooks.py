"""What MkDocs adds to the pages of this folder: benchmarks, and the keys of the job file."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from hpc_absa.config import Job
from hpc_absa.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `benchmarks/`, and those that are made from the code."""
    for path in sorted((ROOT / "benchmarks").glob("*.md")):
        text = path.read_text(encoding="utf-8").replace("](../docs/", "](../")
        files.append(File.generated(config, f"benchmarks/{path.name}", content=text))
    files.append(File.generated(config, "job-keys.md", content=job_keys()))
    schema = json.dumps(Job.model_json_schema(by_alias=True), indent=2)
    files.append(File.generated(config, "job.schema.json", content=schema))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../benchmarks/", "](benchmarks/")


def job_keys() -> str:
    """The page with every key of a job file, its type, its default and its docstring."""
    parts = [
        "# Every key of a job file",
        "This page is made from the code. [job-file.md](job-file.md) explains the keys in context. "
        "Editors that check TOML with a JSON schema can use [job.schema.json](job.schema.json).",
    ]
    parts += [_table("Top level", Job, {n: n for n in ("name", "seed")})]
    for name, field in Job.model_fields.items():
        model = field.annotation
        if inspect.isclass(model) and issubclass(model, BaseModel):
            parts.append(_table(f"`[{name}]`", model))
    for method, model in SCHEDULES.items():
        parts.append(_table(f"`[schedule]` with `method = {json.dumps(method)}`", model))
    return "\n\n".join(parts) + "\n"


def _table(title: str, model: type[BaseModel], only: dict[str, str] | None = None) -> str:
    described = _docstrings(model)
    properties = model.model_json_schema(by_alias=True).get("properties", {})
    lines = [f"## {title}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if only and name not in only:
            continue
        key = field.alias or name
        shown = properties.get(key, {})
        default = json.dumps(shown["default"], ensure_ascii=False) if "default" in shown else ""
        meaning = described.get(name, "")
        cells = (f"`{key}`", _type(shown), f"`{default}`" if default else "required", meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    names = {"null": "not set", "array": "list", "object": "table", "number": "number"}
    kind = str(schema.get("type", "table"))
    return names.get(kind, kind)


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field, of the class and its bases, by name of the field."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not (issubclass(owner, BaseModel) and owner.__module__.startswith("hpc_absa")):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for statement, following in itertools.pairwise(body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(text)):
                    found[name] = " ".join(str(text).split())
    return found
