"""A real Grid Engine of one host, in a temporary folder, on free ports."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.slurm.cluster import free_ports, wait_until

DEBIAN = Path("/var/lib/gridengine"), Path("/usr/share/gridengine/scripts/init_cluster")
PROGRAMS = ("sge_qmaster", "sge_execd", "qsub", "qconf", "qacct")
BOOTSTRAP = """
admin_user none
default_domain none
ignore_fqdn false
spooling_method berkeleydb
spooling_lib libspoolb
spooling_params {folder}/spool
binary_path /usr/sbin
qmaster_spool_dir {folder}/qmaster
security_mode none
listener_threads 2
worker_threads 2
scheduler_threads 1
"""
PARALLEL_ENVIRONMENT = """
pe_name mpi
slots 16
user_lists NONE
xuser_lists NONE
start_proc_args NONE
stop_proc_args NONE
allocation_rule $fill_up
control_slaves TRUE
job_is_first_task FALSE
urgency_slots min
accounting_summary TRUE
qsort_args NONE
"""
QUEUE = {"hostlist": "{host}", "pe_list": "mpi", "slots": "2", "load_thresholds": "NONE"}


def missing() -> str | None:
    """Why there can be no cell here, None where there can."""
    if os.geteuid() != 0:
        return "Grid Engine's daemons are started as root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    absent += [str(each) for each in DEBIAN if not each.exists()]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: gridengine-master, -exec, -client)"
    return None


class Cell:
    """The daemons, and Grid Engine's commands talking to them."""

    def __init__(self, folder: Path) -> None:
        """Write the configuration; nothing runs yet."""
        self.folder, self.host = folder, socket.gethostname()
        master, execution = free_ports(2)
        self.environment = os.environ | {
            "SGE_ROOT": str(folder),
            "SGE_CELL": "default",
            "SGE_QMASTER_PORT": str(master),
            "SGE_EXECD_PORT": str(execution),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
        for each in DEBIAN[0].iterdir():
            if each.name != "default":
                (folder / each.name).symlink_to(each)
        common = folder / "default" / "common"
        for path in (common, folder / "spool", folder / "qmaster" / "job_scripts"):
            path.mkdir(parents=True)
        (folder / "execd").mkdir()
        (common / "bootstrap").write_text(BOOTSTRAP.format(folder=folder))
        (common / "act_qmaster").write_text(f"{self.host}\n")
        # its own name for whatever this machine's address is called: it refuses `localhost`
        (common / "host_aliases").write_text(f"{self.host} localhost\n")
        self.command(str(DEBIAN[1]), str(folder), "default", str(folder / "spool"), "root")

    def start(self) -> None:
        """Start both daemons, and give root two slots in a queue."""
        self.command("sge_qmaster")
        wait_until(lambda: self.host in self.command("qconf", "-sh"), 30, "sge_qmaster")
        settings = self._changed("qconf -sconf", min_uid="0", min_gid="0")
        settings = settings.replace("/var/spool/gridengine/execd", str(self.folder / "execd"))
        self._give("-Mconf", "global", settings)
        self.command("qconf", "-as", self.host)
        self.command("sge_execd")
        wait_until(lambda: self.host in self.command("qconf", "-sel"), 30, "sge_execd")
        self._give("-Ap", "pe", PARALLEL_ENVIRONMENT)
        queue = {key: value.format(host=self.host) for key, value in QUEUE.items()}
        self._give("-Aq", "queue", self._changed("qconf -sq", qname="main", **queue))

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        self.command("qdel", "-f", "-u", "*")
        self.command("qconf", "-ke", "all")
        self.command("qconf", "-km")

    def command(self, *words: str) -> str:
        """Output of one of Grid Engine's commands, with errors."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr

    def submit(self, folder: Path, *words: str) -> str:
        """Submit a job from a folder; returns its id."""
        done = subprocess.run(
            ("qsub", "-terse", *words),
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def jobs(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        lines = self.command("qstat", "-u", "*").splitlines()
        return [line.split()[0] for line in lines if line.split()[:1] and line.split()[0].isdigit()]

    def _changed(self, command: str, **values: str) -> str:
        """The attributes that a command prints, some with other values."""
        lines = self.command(*command.split()).splitlines()
        named = (line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
        return "".join(f"{n[0]} {values.get(n[0], n[-1])}\n" for n in named)

    def _give(self, option: str, name: str, attributes: str) -> None:
        path = self.folder / name
        path.write_text(attributes)
        self.command("qconf", option, str(path))
