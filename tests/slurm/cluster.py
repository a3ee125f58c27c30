"""A real Slurm of four nodes on this machine, in a temporary folder, on free ports.

One munged, one slurmctld and four slurmd, all as the current user, without special rights. Each
node has two CPUs, whatever the machine has, and runs under this machine's name and address.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm import accounting

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2", "n3", "n4")
CONFIGURATION = """
ClusterName=absa
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=10
TCPTimeout=5
MessageTimeout=10
KillWait=20
OverTimeLimit=0
CompleteWait=0
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
{accounting}
{nodes}
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=60 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-4] MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=narrow Nodes=n[1-4] MaxNodes=2 MaxTime=60 PriorityTier=1
"""


def missing(programs: tuple[str, ...] = PROGRAMS, debian: str = "slurm-wlm, munge") -> str | None:
    """Why there can be no cluster with these programs here, None where there can."""
    absent = [name for name in programs if not find(name)]
    return f"{', '.join(absent)} not installed (Debian: {debian})" if absent else None


def find(program: str) -> str | None:
    """A program's path; daemons are in `sbin`, which is not on every PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """The daemons, and Slurm's commands talking to them."""

    def __init__(self, folder: Path, accounts: bool = False) -> None:
        """Write the configuration; nothing runs yet. With `accounts`, jobs are also in `sacct`."""
        self.folder, self._database_port = folder, 0
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        folder.chmod(0o755)  # munged requires that nobody else can write
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        controller, daemon, database, *ports = free_ports(3 + len(NODES))
        section = ""
        if accounts:
            section, self._database_port = accounting.configure(folder, daemon, database), database
        nodes = (
            f"NodeName={name} NodeHostname=localhost Port={port} CPUs=2 RealMemory=1000"
            for name, port in zip(NODES, ports, strict=True)
        )
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(
                folder=folder,
                user=pwd.getpwuid(os.geteuid()).pw_name,
                controller_port=controller,
                accounting=section,
                nodes="\n".join(nodes),
            )
        )
        self.environment = os.environ | {"SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start all daemons; returns when every node is idle."""
        for name in NODES:
            (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        options = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options |= {"key-file": "key"}
        words = (f"--{option}={self.folder}/munge.{end}" for option, end in options.items())
        self._spawn("munged", "--foreground", *words)
        wait_until((self.folder / "munge.socket").exists, 10, "munged's socket")
        if self._database_port:
            self._start_accounting()
        self.start_controller()
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: self.states() == dict.fromkeys(NODES, "idle"), 60, "idle nodes")

    def _start_accounting(self) -> None:
        """Start MariaDB and slurmdbd, and make this cluster known to them."""
        self._spawn("mariadbd", *accounting.database_words(self.folder, self._database_port))
        wait_until((self.folder / "database.socket").exists, 60, "MariaDB's socket")
        self._spawn("slurmdbd", "-D")
        add = ("sacctmgr", "-i", "add", "cluster", "absa")
        wait_until(lambda: "Name" in self.command(*add), 60, "slurmdbd")

    def start_controller(self) -> None:
        """Start slurmctld, with the state it left behind if it was there before."""
        self._spawn("slurmctld", "-D")
        wait_until(lambda: "UP" in self.command("scontrol", "ping"), 30, "slurmctld")

    def start_node(self, name: str) -> None:
        """Start one node's slurmd."""
        self._spawn("slurmd", "-D", "-N", name, key=name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End one daemon (`slurmctld` or a node's name): by SIGKILL, as a crash would."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        daemon.wait()

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons, munged last."""
        if "slurmctld" in self._daemons:
            self.command("scancel", "--user", str(os.geteuid()))
            for job in self.jobs():
                self.command("scancel", "--signal=KILL", "--full", job)
        for name in reversed(list(self._daemons)):
            daemon = self._daemons.pop(name)
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def command(self, program: str, *words: str) -> str:
        """Standard output of one of Slurm's commands; errors are part of it."""
        path = find(program)
        assert path, program
        done = subprocess.run(
            [path, *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """Each node's state as sinfo writes it, without flags."""
        lines = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()
        words = (line.split() for line in lines)
        return {pair[0]: pair[1].rstrip("*~#$%@^-+") for pair in words if len(pair) == 2}

    def jobs(self) -> list[str]:
        """Ids of the jobs that are pending or running."""
        return self.command("squeue", "-h", "-o", "%A").split()

    def completed(self) -> list[dict[str, str]]:
        """Every job that ended, from Slurm's record of completed jobs."""
        path = self.folder / "completed.txt"
        if not path.exists():
            return []
        lines = path.read_text().splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def _spawn(self, program: str, *words: str, key: str | None = None) -> None:
        path = find(program)
        assert path, program
        with (self.folder / f"{key or program}.out").open("ab") as output:
            self._daemons[key or program] = subprocess.Popen(
                [path, *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Return once `true()` is, or fail with what was waited for."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise AssertionError(f"no {what} within {seconds} s")
        time.sleep(0.1)
