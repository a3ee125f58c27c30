"""The package's job files and sweep files; a sweep is told by its grid."""

import tomllib
from pathlib import Path

JOBS = Path(__file__).parents[1] / "jobs"
_FILES = sorted(JOBS.rglob("*.toml"))
SWEEP_FILES = [path for path in _FILES if "grid" in tomllib.loads(path.read_text("utf-8"))]
JOB_FILES = [path for path in _FILES if path not in SWEEP_FILES]


def name(path: Path) -> str:
    """For test ids."""
    return str(path.relative_to(JOBS).with_suffix(""))
