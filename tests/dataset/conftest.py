"""A real PostgreSQL server for the tests that need one."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


class Postgres:
    """A server of its own in a temporary folder, on a Unix socket; as root it runs as the user postgres."""

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
        assert done.returncode == 0, done.stdout

    def start(self) -> None:
        """And wait until it answers."""
        options = f"-c listen_addresses='' -k {self.folder} -c fsync=off -c max_connections=50"
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "-t", "120", "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        """mode: fast (connections are cut) or immediate (as a crash)."""
        self._run("pg_ctl", "-D", "data", "-m", mode, "-w", "stop")

    def database(self) -> str:
        """The URL of a new, empty database."""
        self.count += 1
        name = f"t{self.count}"
        self._run("createdb", "-h", str(self.folder), "-U", "postgres", name)
        return f"postgresql://postgres@/{name}?host={self.folder}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server, or a skip that is hard to overlook."""
    missing = [name for name in ("initdb", "pg_ctl", "postgres", "createdb") if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"POSTGRESQL IS NOT TESTED: {', '.join(missing)} not on PATH; install postgresql and add its bin folder"
        )
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short, since a socket's path may have 107 characters
    server = Postgres(folder)
    server.start()
    yield server
    server.stop("immediate")
    shutil.rmtree(folder)
