"""What a killed rank and a bad checkpoint cost, under torchrun with DCP and `hpc-absa launch`.

    python -m benchmarks.elastic [torchrun] [launched]

One language model on two ranks of one machine. The cases: undisturbed; one rank is killed by
SIGKILL after step 70; and, of a run that was stopped after half of its steps, the newest checkpoint
is cut off as by a crash, or has four flipped bytes.
"""

from __future__ import annotations

import difflib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent
KILL_AT = 70
PATIENCE = 180
"""Seconds after which a run is taken to hang; it takes about 20 where nothing else runs."""


def words(name: str, folder: Path) -> list[str]:
    """The command of a run on two ranks."""
    script = ["-m", f"benchmarks.elastic.{name}", str(folder)]
    if name == "torchrun":
        program = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
        return [*program, "--nproc-per-node=2", "--max-restarts=3", *script]
    launch = [sys.executable, "-m", "hpc_absa", "launch", "--run-dir", str(folder / "run")]
    # the folder, an argument of the script, is another one where a run is continued in a copy
    options = ["--ranks=2", "--max-ranks=2", "--allow-changed=command"]
    return [*launch, *options, "--", "python", *script]


def start(name: str, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRACE": str(folder / "trace"),
    }
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(words(name, folder), env=environment, stdout=output, stderr=output)


def ranks(folder: Path) -> Iterator[int]:
    """Process ids of the ranks of a run."""
    mine = f"TRACE={folder}/trace".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        names = {variable.partition(b"=")[0] for variable in variables}
        if mine in variables and names & {b"LOCAL_RANK", b"OMPI_COMM_WORLD_RANK"}:
            yield int(path.parent.name)


def newest(folder: Path) -> Path:
    """The largest file of the newest checkpoint."""
    files = [*folder.glob("saved/*/*.distcp"), *folder.glob("run/checkpoints/step-*.h5")]
    last = max(str(path.parent if path.suffix == ".distcp" else path) for path in files)
    return max((p for p in files if str(p).startswith(last)), key=lambda p: p.stat().st_size)


def trace(folder: Path) -> list[tuple[int, float]]:
    """Step and time, in the order in which they were done."""
    path = folder / "trace"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(step), float(at)) for step, at in map(str.split, lines)]


def wait_for(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not any(s >= step for s, _ in trace(folder)):
        time.sleep(0.02)


def weights(folder: Path, reference: Path) -> str:
    if not (folder / "model.pt").exists():
        return "no weights"
    one, other = (torch.load(path / "model.pt") for path in (folder, reference))
    return "same bits" if all(torch.equal(one[n], other[n]) for n in one) else "other weights"


def finish(process: subprocess.Popen[bytes]) -> str:
    try:
        return f"exit status {process.wait(PATIENCE)}"
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return f"did not end within {PATIENCE} s"


def killed(name: str, folder: Path, reference: Path) -> str:
    process = start(name, folder)
    wait_for(folder, KILL_AT, process)
    os.kill(max(ranks(folder)), signal.SIGKILL)
    at = time.time()
    ended, done = finish(process), trace(folder)
    repeated = len(done) - len({step for step, _ in done})
    back = next((t - at for s, t in done if t > at + 1), float("nan"))
    return f"{ended}, {back:.1f} s to the next step, {repeated} steps repeated, " + (
        weights(folder, reference)
    )


def damaged(name: str, folder: Path, half: Path, reference: Path, how: str) -> str:
    shutil.copytree(half, folder)
    path = newest(folder)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "cut off":
        del content[middle:]
        (path.parent / ".metadata").unlink(missing_ok=True)  # DCP writes it last
    else:
        content[middle : middle + 4] = (255 - byte for byte in content[middle : middle + 4])
    path.write_bytes(content)
    return f"{finish(start(name, folder))}, {weights(folder, reference)}"


def changed_lines(name: str) -> int:
    """Lines of `main` that plain.py does not have, without those for this benchmark."""
    mains = [(HERE / f"{n}.py").read_text().split("def main")[1] for n in ("plain", name)]
    plain, own = (main.split("\n\n\n")[0].splitlines() for main in mains)
    added = (line[2:].strip() for line in difflib.ndiff(plain, own) if line.startswith("+ "))
    return sum(bool(line) and not line.startswith("trace(") for line in added)


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        for name in sys.argv[1:] or ("torchrun", "launched"):
            print(f"{name}: {changed_lines(name)} changed or added lines", flush=True)
            reference, half = Path(root, f"{name}-reference"), Path(root, f"{name}-half")
            begin = time.time()
            ended = finish(start(name, reference))
            print(f"  undisturbed: {ended}, {time.time() - begin:.1f} s", flush=True)
            print(f"  killed: {killed(name, Path(root, f'{name}-killed'), reference)}", flush=True)
            process = start(name, half)
            wait_for(half, len(trace(reference)) // 2, process)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            for how in ("cut off", "flipped"):
                folder = Path(root, f"{name}-{how[:3]}")
                print(f"  {how}: {damaged(name, folder, half, reference, how)}", flush=True)


if __name__ == "__main__":
    main()
