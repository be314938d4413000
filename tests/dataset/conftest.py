"""A real PostgreSQL server and a disk that can be filled, for the tests that need them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from soundstage.testing.disks import SmallDisk, small_disk
from soundstage.testing.postgres import Postgres, missing_programs, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server, or a skip that is hard to overlook."""
    if missing := missing_programs():
        pytest.skip(
            f"POSTGRESQL IS NOT TESTED: {', '.join(missing)} not on PATH; install postgresql and add its bin folder"
        )
    with postgres_server() as server:
        yield server


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of a few megabytes, or a skip that is hard to overlook."""
    try:
        with small_disk(tmp_path / "disk", megabytes=16) as mounted:
            yield mounted
    except OSError as error:
        pytest.skip(f"A FULL DISK IS NOT TESTED: {error}")
