"""Two hosts in network namespaces of this machine, each with a name, an address and an sshd."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

SSHD = "/usr/sbin/sshd"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str | None:
    """Why there can be none here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [p for p in ("ip", "ssh", "ssh-keygen", "unshare") if not shutil.which(p)]
    absent += [] if Path(SSHD).exists() else ["sshd"]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: iproute2, openssh-server)"
    tried = subprocess.run(["ip", "netns", "add", "absa-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "absa-try"], capture_output=True)
    return f"no network namespaces: {tried.stderr.strip()}" if tried.returncode else None


class TwoHosts:
    """Host 0, where commands run, and host 1, reached by ssh over a network that can be down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(f"absa{os.getpid()}-{letter}" for letter in "ab")
        self._sshd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Connect the hosts and start sshd on host 1, with new keys."""
        one, other = self.names
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run(
            *("ip", "link", "add", "veth0", "netns", one, "type", "veth"),
            *("peer", "name", "veth0", "netns", other),
        )
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                _run("ip", "-n", name, "link", "set", device, "up")
        for key in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {ADDRESSES[1]}\nHostKey {self.folder}/host\n"
            f"AuthorizedKeysFile {self.folder}/user.pub\nStrictModes no\nUsePAM no\n"
            f"PidFile {self.folder}/sshd.pid\nPermitRootLogin yes\n"
        )
        (self.folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.folder}/user\n  StrictHostKeyChecking no\n"
            f"  UserKnownHostsFile {self.folder}/known\n  BatchMode yes\n  ConnectTimeout 3\n"
            "  LogLevel ERROR\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        self._sshd = subprocess.Popen(
            self.inside(1, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")),
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "sshd.log").open("wb"),
        )
        until = time.monotonic() + 20
        agent = self.agent.split()
        while subprocess.run(
            self.inside(0, *agent, ADDRESSES[1], "true"), capture_output=True
        ).returncode:
            if time.monotonic() > until:
                raise AssertionError((self.folder / "sshd.log").read_text())
            time.sleep(0.2)

    def stop(self) -> None:
        """End sshd and remove the namespaces."""
        if self._sshd:
            self._sshd.terminate()
            self._sshd.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    @property
    def agent(self) -> str:
        """The program that reaches host 1."""
        return f"ssh -F {self.folder}/ssh_config"

    def inside(self, host: int, *words: str) -> list[str]:
        """The command that runs `words` on a host, under that host's name."""
        name = self.names[host]
        script = f'hostname {name}; exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script, "x", *words]

    def network(self, state: str) -> None:
        """Set host 1's network `down` or `up`."""
        _run("ip", "-n", self.names[1], "link", "set", "veth0", state)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
