"""Slurm's accounting: a slurmdbd and its MariaDB in a cluster's folder, as `sacct` asks them."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct", "sacctmgr")
IN_SLURM = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
"""
IN_DAEMON = """
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""
SETTINGS = """
CREATE DATABASE slurm_acct;
CREATE USER slurm@localhost IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct.* TO slurm@localhost;
"""


def configure(folder: Path, port: int, database_port: int) -> str:
    """Write slurmdbd's configuration and an empty database; returns what slurm.conf needs."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    path = folder / "slurmdbd.conf"
    path.write_text(
        IN_DAEMON.format(folder=folder, user=user, port=port, database_port=database_port)
    )
    path.chmod(0o600)  # slurmdbd refuses a file with a password that others can read
    (folder / "begin.sql").write_text(SETTINGS)
    words = ("--no-defaults", f"--datadir={folder}/database", f"--user={user}", "--skip-test-db")
    subprocess.run(("mariadb-install-db", *words), check=True, capture_output=True)
    return IN_SLURM.format(folder=folder, port=port)


def database_words(folder: Path, port: int) -> tuple[str, ...]:
    """Arguments of mariadbd."""
    return (
        "--no-defaults",
        f"--datadir={folder}/database",
        f"--socket={folder}/database.socket",
        f"--pid-file={folder}/database.pid",
        f"--port={port}",
        "--bind-address=127.0.0.1",
        f"--init-file={folder}/begin.sql",
        f"--user={pwd.getpwuid(os.geteuid()).pw_name}",
        "--innodb-lock-wait-timeout=900",
        "--innodb-flush-log-at-trx-commit=0",
    )
