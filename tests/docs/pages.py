"""The pages of the documentation, their code blocks, and the shell commands in these."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = (
    "hpc-absa", "make", "mpirun", "horovodrun", "python", "launch/", "sbatch", "qsub", "bsub",
    "conda", "module", ". ", "source", "pip", "ssh", "h5ls", "export", "exec", "JOB=",
    ".venv/bin/", "srun",
)  # fmt: skip
"""What an indented block begins with if it has commands, and not a table of a job file."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """Fenced blocks with their languages; blocks by indentation have the language `indented`."""
    found, lines = [], text_of(page).splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"( *)```(\w*)$", lines[number])
        start = number
        if fence:
            number += 1
            while not re.match(rf"{fence[1]}```$", lines[number]):
                number += 1
            inside = [line.removeprefix(fence[1]) for line in lines[start + 1 : number]]
            found.append(Block(page, start + 1, fence[2], "\n".join(inside) + "\n"))
        elif lines[number].startswith("    ") and number and not lines[number - 1].strip():
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            inside = [line.removeprefix("    ") for line in lines[start:number]]
            if not inside[0].startswith(("|", "- ")):  # in a list
                found.append(Block(page, start + 1, "indented", "\n".join(inside).strip() + "\n"))
        number += 1
    return found


def shell_blocks():
    """Every block that is for a shell: scripts, and blocks of commands."""
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("bash", "sh") or (
                block.language in ("", "indented") and block.text.startswith(PROGRAMS)
            ):
                yield block


def commands(block):
    """The commands of a block, with lines joined and without comments."""
    if "<<EOF" in block.text:
        return [block.text]
    lines = block.text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines]
    return [line for line in lines if line]


def inline_commands(page):
    """Commands of this program within a sentence or a table."""
    return re.findall(r"`((?:mpirun -np \w+ )?hpc-absa [a-z][^`]*)`", text_of(page))


def words(command):
    """The words of the part of a command that is this program's: from `hpc-absa` to a `|`."""
    found = shlex.split(command.replace("\\|", "|"), comments=True)
    begins = [n for n, word in enumerate(found) if word.rpartition("/")[2] == "hpc-absa"]
    if not begins:
        return []
    found = found[begins[0] + 1 :]
    ends = [n for n, word in enumerate(found) if word in ("|", "&&", ";", ">", "…", "...")]
    return found[: ends[0]] if ends else found
