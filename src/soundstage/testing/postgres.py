"""A real PostgreSQL server of one's own, in a folder, on a Unix socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PROGRAMS", "Postgres", "missing_programs", "postgres_server"]

PROGRAMS = ("initdb", "pg_ctl", "postgres", "createdb")


class Postgres:
    """A server in an empty folder; as root it runs as the user postgres. Raises RuntimeError where a program fails."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.as_user = (
            ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        )
        if self.as_user:
            shutil.chown(folder, "postgres")
        self._run("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-N", "--no-instructions", "-E", "UTF8")

    def _run(self, *command: str) -> None:
        program = shutil.which(command[0]) or command[0]
        done = subprocess.run(
            [*self.as_user, program, *command[1:]],
            cwd=self.folder,
            env={**os.environ, "HOME": str(self.folder), "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stdout}")

    def start(self) -> None:
        """And wait until it answers."""
        options = f"-c listen_addresses='' -k {self.folder} -c fsync=off -c max_connections=50"
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "-t", "120", "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        """mode: fast (connections are cut) or immediate (as a crash)."""
        self._run("pg_ctl", "-D", "data", "-m", mode, "-w", "stop")

    def restart(self, mode: str = "fast") -> None:
        """Stop, and start again."""
        self.stop(mode)
        self.start()

    def database(self) -> str:
        """The URL of a new, empty database."""
        self.count += 1
        name = f"t{self.count}"
        self._run("createdb", "-h", str(self.folder), "-U", "postgres", name)
        return f"postgresql://postgres@/{name}?host={self.folder}"


def missing_programs() -> list[str]:
    """Of those that a server needs."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A running server, gone with its folder afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short, since a socket's path may have 107 characters
    server = Postgres(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(folder)
