"""The web site: pages that are made from the code, and a build without warnings or other hosts."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from hpc_absa import config
from tests.config.test_documented import REQUIRED
from tests.docs.pages import ROOT
from tests.docs.test_pages import COMMANDS, KEYS


@pytest.fixture(name="hooks", scope="module")
def _hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def test_the_page_of_keys_has_every_key_with_a_meaning(hooks):
    page = hooks.job_keys()
    rows = re.findall(r"(?m)^\| `([\w-]+)` \| (.*) \| (.*) \| (.*) \|$", page)
    assert {key.rpartition(".")[2] for key in KEYS} - set(hooks.TABLES) - {"schedule", "slurm"} <= {
        row[0] for row in rows
    }
    assert {key for key, *_, meaning in rows if not meaning} <= {"method"}
    assert "| `lr` | number, > 0 | required |" in page


def test_the_schema_describes_job_files(hooks):
    schema = json.loads(hooks.job_schema())
    assert set(schema["required"]) == {"name", "data", "model", "train", "schedule"}
    assert set(schema["properties"]) == set(config.Job.model_fields)
    assert set(REQUIRED) <= set(schema["properties"])


def test_the_page_of_commands_has_every_command_and_option(hooks):
    page = hooks.commands()
    for name, command in COMMANDS.items():
        assert f"\n## {name}\n" in page
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}`" in page


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("library.md", "../examples/plain.py", "examples/plain.md"),
        ("results.md", "../benchmarks/README.md#x", "benchmarks/README.md#x"),
        ("benchmarks/curvature.md", "../docs/curvature.md", "../curvature.md"),
        ("contributing.md", "docs/install.md", "install.md"),
        ("faults.md", "../CONTRIBUTING.md", "contributing.md"),
        ("faults.md", "data.md#models", "data.md#models"),
        ("faults.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("faults.md", "#timeouts", "#timeouts"),
    ],
)
def test_links_between_files_become_links_between_pages(hooks, page, link, expected):
    assert hooks.relink(f"[a]({link})", page) == f"[a]({expected})"


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason="pip install 'hpc-absa[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install 'hpc-absa[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?stylesheet\"?[^>]*href=\"?([^\" >]+)", text)
        assert [place for place in loaded if re.match(r"(https?:)?//", place)] == [], page
    assert "reproducible" in (tmp_path / "job-keys.html").read_text()
    assert "top_eigenvalue" in (tmp_path / "api.html").read_text()
    assert (tmp_path / "job.schema.json").stat().st_size > 10_000
