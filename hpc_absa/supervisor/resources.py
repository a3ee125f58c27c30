"""Where ranks can run: this machine, the tasks of a batch job, or hosts given by name.

Named hosts are filled in the order in which they are listed. After a failure all hosts of the
failed phase are checked with the program by which mpirun reaches them. A host that does not answer,
and a host at which two failures in a row occurred, is not used for `launch.cool_down` seconds. If
it answers then, it is used again; where the batch feeds its ranks, the running phase is relaunched.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

from hpc_absa import allocation, worldsize
from hpc_absa.allocation import Hosts
from hpc_absa.config import Job, Launch, Launchable
from hpc_absa.errors import UsageError

AGENT = "ssh -o BatchMode=yes -o ConnectTimeout=5"
"""Reaches a host unless `launch.rsh_agent` or `plm_rsh_agent` of Open MPI names a program."""
OPEN_MPI_AGENT = "OMPI_MCA_plm_rsh_agent"
ANSWER_SECONDS = 15.0
"""A host that takes longer to answer is taken to be down."""
CHECK_INTERVAL = 2.0
"""Seconds between checks whether a host's cool-down is over."""

HostChanged = Callable[[str, str, str], None]
"""Called with a host's name, `set_aside` or `returned`, and the reason."""


class Resources:
    """A fixed number of ranks, on this machine or where the launcher puts them."""

    def __init__(self, available: int, maximum: int | None = None) -> None:
        self._available = available
        self._maximum = max(available, maximum or 0)

    def available(self) -> int:
        """Ranks that the next launch can have."""
        return self._available

    def maximum(self) -> int:
        """Ranks that the trainer may ask for; what a batch would feed beyond is accumulated."""
        return self._maximum

    def place(self, job: Launchable, ranks: int) -> Launchable:
        """The job with the launcher and the hosts for `ranks` ranks."""
        return job

    def report_failure(self, host: str | None) -> None:
        """The last launch failed, at this host as far as is known."""

    def report_success(self) -> None:
        """The last launch ended without a failure."""

    def watch(self, on_return: Callable[[], None]) -> AbstractContextManager[None]:
        """While ranks run, call `on_return`, from a thread, when more ranks become available."""
        return nullcontext()


class BatchJobTasks(Resources):
    """The tasks of the current batch job; the next job of the chain may have up to `maximum`."""

    def place(self, job: Launchable, ranks: int) -> Launchable:
        launch = job.launch.model_copy(update={"launcher": job.launch.slurm.step, "hosts": ""})
        return job.model_copy(update={"launch": launch})


class HostPool(Resources):
    """Hosts given by name, with those that failed set aside for a time."""

    def __init__(
        self,
        job: Launchable,
        hosts: Hosts,
        on_change: HostChanged,
        answers: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
        by_scheduler: bool = False,
    ) -> None:
        """
        Args:
            job: a job or a script.
            hosts: with their slots.
            on_change: called with each host that is set aside or returns.
            answers: whether a host can be reached; by default with the rsh agent.
            clock: seconds.
            by_scheduler: the hosts are a scheduler's, whose own daemons start the ranks: one that
                the agent has never reached is not taken to be down.
        """
        self._hosts, self._on_change, self._clock = hosts, on_change, clock
        self._limit = job.ranks.max or sum(slots for _, slots in hosts)
        self._cool_down = job.launch.cool_down
        agent = agent_of(job)
        self._answers = answers or (lambda host: is_reachable(host, agent))
        self._reached = set[str]() if by_scheduler else {name for name, _ in hosts}
        self._set_aside_until: dict[str, float] = {}
        self._suspect: str | None = None
        self._placed: Hosts = hosts

    def available(self) -> int:
        return min(self._limit, sum(slots for _, slots in self._usable()))

    def maximum(self) -> int:
        """As available: a host that returns causes a relaunch without a decision."""
        return self.available()

    def place(self, job: Launchable, ranks: int) -> Launchable:
        self._placed = fill(self._usable(), ranks)
        hosts = ",".join(f"{name}:{slots}" for name, slots in self._placed)
        launch = job.launch.model_copy(update={"hosts": hosts})
        return job.model_copy(update={"launch": launch})

    def report_failure(self, host: str | None) -> None:
        """Set aside the last launch's hosts that do not answer, or failed twice in a row."""
        names = [name for name, _ in self._placed]
        alive = self._ask(names)
        for name in (name for name in names if not alive[name] and name in self._reached):
            self._set_aside(name, "it does not answer")
        failed = next((name for name in names if host and _is_same(name, host)), None)
        if failed and failed == self._suspect and alive[failed] and len(names) > 1:
            self._set_aside(failed, "a second failure in a row")
            failed = None
        self._suspect = failed

    def report_success(self) -> None:
        self._suspect = None

    @contextmanager
    def watch(self, on_return: Callable[[], None]) -> Iterator[None]:
        over = threading.Event()

        def check() -> None:
            while not over.wait(CHECK_INTERVAL):
                if self.retry_hosts():
                    on_return()

        threading.Thread(target=self.reach, name="reach", daemon=True).start()
        thread = threading.Thread(target=check, name="hosts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def reach(self) -> None:
        """Find out which of the last launch's hosts the agent reaches, while they are well."""
        for name, _ in self._placed:
            if name not in self._reached and self._answers(name):
                self._reached.add(name)

    def retry_hosts(self) -> bool:
        """Use hosts again that have cooled down and answer; whether there were any."""
        now = self._clock()
        due = [name for name, until in list(self._set_aside_until.items()) if until <= now]
        alive = self._ask(due)
        for name in due:
            if alive[name]:
                del self._set_aside_until[name]
                self._on_change(name, "returned", "it answers again")
            else:
                self._set_aside_until[name] = self._clock() + self._cool_down
        return any(alive.values())

    def _ask(self, names: Sequence[str]) -> dict[str, bool]:
        """Whether each host answers; they are asked together, as each may take long."""
        with ThreadPoolExecutor(max_workers=16) as pool:
            return dict(zip(names, pool.map(self._answers, names), strict=True))

    def _usable(self) -> Hosts:
        """The hosts not set aside; where all are, all of them, since something must be tried."""
        return [h for h in self._hosts if h[0] not in self._set_aside_until] or self._hosts

    def _set_aside(self, name: str, why: str) -> None:
        self._set_aside_until[name] = self._clock() + self._cool_down
        self._on_change(name, "set_aside", f"{why}; tried again in {self._cool_down:.0f} s")


def resources_of(job: Launchable, on_change: HostChanged) -> Resources:
    """The hosts that the job names, those of the scheduler's allocation, or this machine.

    Raises:
        UsageError: they have fewer slots than a job file has initial ranks.
    """
    named = worldsize.stated_hosts(job)
    current = None if named else allocation.detect()
    slots = current.slots if current else sum(count for _, count in named)
    if isinstance(job, Job) and (named or current) and slots < job.ranks.initial:
        place = "the hosts" if named else "this batch job"
        raise UsageError(
            f"ranks.initial = {job.ranks.initial}: expected at most {slots}, the slots of {place}; "
            "start with fewer ranks, or ask for more slots"
        )
    if current and (current.scheduler != "Slurm" or job.launch.launcher == "horovodrun"):
        named = list(current.hosts)  # within Slurm, mpirun and srun know their hosts themselves
    if named:
        return HostPool(job, named, on_change, by_scheduler=current is not None)
    limit = worldsize.limit(job)
    return Resources(min(limit, current.slots) if current else limit)


def only_here(launch: Launch) -> bool:
    """Whether all ranks of a placed launch are children of its mpirun, on this host."""
    current = allocation.detect()
    single = current is None or len(current.hosts) == 1
    return launch.launcher == "mpirun" and not launch.hosts and single


def fill(hosts: Hosts, ranks: int) -> Hosts:
    """The hosts that `ranks` ranks fill one after the other, each with the slots used on it.

    With more ranks than slots, as after the loss of a host, all hosts with all their slots.
    """
    filled: Hosts = []
    for name, slots in hosts:
        left = ranks - sum(taken for _, taken in filled)
        if left > 0:
            filled.append((name, min(slots, left)))
    return filled


def agent_of(job: Launchable) -> tuple[str, ...]:
    """The program and its options that reach a host: `AGENT HOST COMMAND`."""
    return tuple(shlex.split(job.launch.rsh_agent or os.environ.get(OPEN_MPI_AGENT) or AGENT))


def is_reachable(host: str, agent: tuple[str, ...]) -> bool:
    """Whether a host runs `true` in time; this machine is not asked."""
    if is_here(host):
        return True
    try:
        done = subprocess.run(
            [*agent, host, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _is_same(name: str, host: str) -> bool:
    """Whether a host is the one of that name, where one of the two may lack the domain."""
    return name == host or name.partition(".")[0] == host or name == host.partition(".")[0]


def is_here(host: str) -> bool:
    """Whether a name or address is this machine's."""
    if host in ("localhost", socket.gethostname(), socket.gethostname().split(".")[0]):
        return True
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
        with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as probe:
            probe.bind((address, 0))  # only a local address can be bound
    except (OSError, UnicodeError):  # the latter of names such as a..b
        return False
    return True
