"""What README and docs name exists: pages, sections, commands, options, keys, files."""

import ast
import itertools
import re
import subprocess
import tomllib

import pytest
import typer
import yaml

from hpc_absa import cli, config
from tests.docs import pages
from tests.docs.pages import PAGES, ROOT, blocks, commands, inline_commands, text_of, words

COMMANDS = typer.main.get_command(cli.app).commands
OPEN = ("data", "model", "loss", "optimizer")
"""Tables that take arguments of what they name."""
RENAMED = "## Renamed keys"
SHELL = list(pages.shell_blocks())


def prose(page):
    """The page without its blocks of code."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", text_of(page))
    return re.sub(r"(?m)^    .*$", "", text)


# Links


def anchors(page):
    """The anchors that GitHub and MkDocs give to the headings of a page."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", text_of(page))
    headings = re.findall(r"(?m)^#+ (.+?)\s*$", text)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or path in ("commands.md", "job-keys.md"):
            continue  # of other sites, or made by `make docs`, which checks them
        file = (ROOT / page).parent / path if path else ROOT / page
        found = file.resolve().is_file()
        if found and anchor and file.suffix == ".md":
            found = anchor in anchors(file.resolve().relative_to(ROOT).as_posix())
        if not found and path != "job.schema.json":
            wrong.append(target)
    assert wrong == []


def test_every_page_is_in_the_navigation_once():
    text = re.sub(r"!!python\S+", "", text_of("mkdocs.yml"))
    listed = [page for part in yaml.safe_load(text)["nav"] for page in next(iter(part.values()))]
    assert len(listed) == len(set(listed))
    pages = {page.removeprefix("docs/") for page in PAGES if "/" in page}
    assert pages <= set(listed)


# Commands


def problems(command):
    """What is wrong with a command of this program: its name, its options, its job keys."""
    found = words(command)
    if not found:
        return
    name, *arguments = found
    if name.startswith("-"):
        return
    if name not in COMMANDS:
        yield f"no command {name}"
        return
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    options = {
        option: parameter
        for parameter in COMMANDS[name].params
        if parameter.param_type_name == "option"
        for option in parameter.opts + parameter.secondary_opts
    }
    for word in arguments:
        if word.startswith("-") and word not in options and word not in ("-h", "--help"):
            yield f"no option {word}"
        if re.match(r"jobs/.*\.toml$", word) and not (ROOT / word).exists():
            yield f"no file {word}"
    for option, value in itertools.pairwise(arguments):
        key = value.partition("=")[0]
        if option == "--set" and key != "KEY" and not is_key(key):
            yield f"no key {key}"


def keys(model, path=""):
    for name, field in model.model_fields.items():
        key = path + (field.alias or name)
        yield key
        if hasattr(field.annotation, "model_fields"):
            yield from keys(field.annotation, f"{key}.")


KEYS = set(keys(config.Job)) | {
    f"schedule.{name}" for rule in config.SCHEDULES.values() for name in rule.model_fields
}


def is_key(key):
    """Whether a job file can have this key."""
    return key in KEYS or key.partition(".")[0] in OPEN


def test_commands_exist_with_their_options_and_keys():
    wrong = [
        (page, command, problem)
        for page in PAGES
        for command in [
            *inline_commands(page),
            *(c for block in SHELL if block.page == page for c in commands(block)),
        ]
        for problem in problems(command)
    ]
    assert wrong == []
    assert len(SHELL) > 30


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("hpc-absa runn JOB", "no command runn"),
        ("mpirun -np 2 hpc-absa train JOB --run-dirs D", "no option --run-dirs"),
        ("hpc-absa run jobs/digit.toml", "no file jobs/digit.toml"),
        ("hpc-absa run JOB --set train.epoch=3", "no key train.epoch"),
        ("hpc-absa launch --max-ranks 2 -- python train.py --data D", None),
        ("hpc-absa run JOB --set model.width=3 | head", None),
    ],
)
def test_a_wrong_command_is_found(command, problem):
    assert list(problems(command)) == ([problem] if problem else [])


def test_shell_blocks_can_be_parsed():
    script = "".join(f"function f{n} {{\n{block.text}}}\n" for n, block in enumerate(SHELL))
    script = re.sub(r"<(class|wnid)>", "X", script).replace("#!/bin/bash\n", "")
    done = subprocess.run(
        ["bash", "-n"], input=script, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_targets_modules_and_scripts_exist():
    targets = re.search(r"(?m)^\.PHONY: (.*)$", text_of("Makefile"))[1].split()
    for page in PAGES:
        text = text_of(page)
        for target in re.findall(r"(?m)(?:^    |`)make ([a-z][a-z-]+)", text):
            assert target in targets, (page, target)
        for module in re.findall(r"python -m (benchmarks[\w.]*|tests\.\w+[\w.]*|hpc_absa)", text):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").exists(), (page, module)
        named = r"(?:`|\s)((?:launch|jobs|examples|tests|hpc_absa|benchmarks)/[\w./-]+\.\w+)"
        for path in re.findall(named, text):
            assert (ROOT / path).exists(), (page, path)


# Code


@pytest.mark.parametrize("page", PAGES)
def test_python_and_toml_blocks_can_be_parsed(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)


def test_keys_in_sentences_exist():
    wrong = []
    for page in PAGES:
        text = text_of(page).split(RENAMED)[0]
        for key in re.findall(r"`((?:\w+\.)+[\w-]+)(?: = [^`]*)?`", text):
            table = key.partition(".")[0]
            strict = table in ("train", "schedule", "hessian", "ranks", "checkpoint", "launch")
            if strict and not is_key(key) and not key.endswith((".sh", ".md", ".py", ".toml")):
                wrong.append((page, key))
    assert wrong == []


# Form


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short_and_lists_begin_after_an_empty_line(page):
    lines = prose(page).splitlines()
    # wrapped at 100; an editor that counts otherwise is forgiven
    long = [line for line in lines if len(line) > 120 and not line.startswith(("|", "#", "!"))]
    assert [line for line in long if " " in line[:120].strip()] == []
    starts = [
        line
        for before, line in itertools.pairwise(lines)
        if re.match(r"([-*]|1\.) ", line)
        and before.strip()
        and not before.startswith("#")
        and not re.match(r"([-*]|\d+\.) | {2,}", before)
    ]
    assert starts == []  # MkDocs would make them part of the paragraph


def test_citation_and_changelog_have_the_version():
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == version
    assert re.search(r"(?m)^## (\S+?),? ", text_of("CHANGELOG.md"))[1] == version
