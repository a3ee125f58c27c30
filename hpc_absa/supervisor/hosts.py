"""Hosts given by name: which of them a world gets, and what becomes of those that fail.

Hosts are filled in the order in which they are stated, each before the next. After a failure all
hosts of the world are asked for a sign of life, by the same program that mpirun reaches them with;
the silent ones, and one at which a second failure in a row points, are set aside for
`launch.cool_down` seconds. A host that then answers is taken back, if need be by a new world.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from hpc_absa.allocation import Hosts
from hpc_absa.config import Job

AGENT = "ssh -o BatchMode=yes -o ConnectTimeout=5"
"""Reaches a host unless `launch.rsh_agent` or `plm_rsh_agent` of Open MPI names a program."""
OPEN_MPI_AGENT = "OMPI_MCA_plm_rsh_agent"
ANSWER_SECONDS = 15.0
"""Longest time in which a living host says yes."""
LOOK_SECONDS = 2.0
"""Between looks at whether a host's time aside is over."""

Tell = Callable[[str, str, str], None]
"""Gets a host's name, `set_aside` or `returned`, and why."""


class HostPool:
    """The job's hosts as resources of a supervisor."""

    def __init__(
        self,
        job: Job,
        hosts: Hosts,
        tell: Tell,
        answers: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """All hosts are in use.

        Args:
            job: its `ranks.max` bounds the ranks, its `launch` says how hosts are reached.
            hosts: names with slots, in the order in which they are filled.
            tell: what becomes of hosts.
            answers: whether a host gives a sign of life.
            clock: seconds.
        """
        self._hosts, self._tell, self._clock = hosts, tell, clock
        self._limit = job.ranks.max or sum(slots for _, slots in hosts)
        self._cool_down = job.launch.cool_down
        agent = agent_of(job)
        self._answers = answers or (lambda host: reached(host, agent))
        self._aside: dict[str, float] = {}
        self._suspect: str | None = None
        self._placed: Hosts = hosts

    def here(self) -> int:
        """The slots of the hosts in use, or one a host where none is left to try."""
        return min(self._limit, sum(slots for _, slots in self.usable()))

    def most(self) -> int:
        """No more than there is: a host that comes back makes a new world by itself."""
        return self.here()

    def usable(self) -> Hosts:
        """The hosts that are not set aside; where all are, all of them: something must be tried."""
        return [h for h in self._hosts if h[0] not in self._aside] or self._hosts

    def placed(self, job: Job, ranks: int) -> Job:
        """The job with just the hosts that `ranks` ranks fill."""
        self._placed = fill(self.usable(), ranks)
        words = ",".join(f"{name}:{slots}" for name, slots in self._placed)
        launch = job.launch.model_copy(update={"hosts": words})
        return job.model_copy(update={"launch": launch})

    def failed(self, host: str | None) -> None:
        """Set aside the hosts of the last world that are silent, or that failed twice in a row."""
        names = [name for name, _ in self._placed]
        with ThreadPoolExecutor(max_workers=16) as pool:
            alive = dict(zip(names, pool.map(self._answers, names), strict=True))
        for name in (name for name in names if not alive[name]):
            self._set_aside(name, "it does not answer")
        if host in names and host == self._suspect and alive[host] and len(names) > 1:
            self._set_aside(host, "a second failure in a row")
            host = None
        self._suspect = host

    def succeeded(self) -> None:
        """A world ended in order: nobody is suspected."""
        self._suspect = None

    @contextmanager
    def watching(self, returned: Callable[[], None]) -> Iterator[None]:
        """While a world runs, try the hosts whose time aside is over; `returned` hears of it."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_SECONDS):
                if self.try_again():
                    returned()

        thread = threading.Thread(target=watch, name="hosts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def try_again(self) -> bool:
        """Take back the hosts whose time aside is over and that answer; whether there were any."""
        due = [name for name, until in list(self._aside.items()) if until <= self._clock()]
        back = [name for name in due if self._answers(name)]
        for name in due:
            if name in back:
                del self._aside[name]
                self._tell(name, "returned", "it answers again")
            else:
                self._aside[name] = self._clock() + self._cool_down
        return bool(back)

    def _set_aside(self, name: str, why: str) -> None:
        self._aside[name] = self._clock() + self._cool_down
        self._tell(name, "set_aside", f"{why}; tried again in {self._cool_down:.0f} s")


def fill(hosts: Hosts, ranks: int) -> Hosts:
    """The hosts that `ranks` ranks fill one after the other, each with the slots that it gives.

    More ranks than slots, as where hosts are lost, crowd onto all of them.
    """
    filled: Hosts = []
    for name, slots in hosts:
        left = ranks - sum(taken for _, taken in filled)
        if left > 0:
            filled.append((name, min(slots, left)))
    return filled


def agent_of(job: Job) -> tuple[str, ...]:
    """The program and its options that reach a host: `AGENT HOST COMMAND`."""
    return tuple(shlex.split(job.launch.rsh_agent or os.environ.get(OPEN_MPI_AGENT) or AGENT))


def reached(host: str, agent: tuple[str, ...]) -> bool:
    """Whether a host runs `true` for us in time; this machine needs no proof."""
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


def is_here(host: str) -> bool:
    """Whether a name or address is this machine's."""
    if host in ("localhost", socket.gethostname(), socket.gethostname().split(".")[0]):
        return True
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
        with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as probe:
            probe.bind((address, 0))  # only an address of ours can be bound
    except OSError:
        return False
    return True


def network_environment(interface: str) -> Mapping[str, str]:
    """What makes MPI, Horovod's Gloo and NCCL talk over one network interface."""
    if not interface:
        return {}
    return {
        "OMPI_MCA_btl_tcp_if_include": interface,
        "OMPI_MCA_oob_tcp_if_include": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "HOROVOD_GLOO_IFACE": interface,
        "GLOO_SOCKET_IFNAME": interface,
    }
