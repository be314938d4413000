"""A real PostgreSQL server, an S3 server and a disk that can be filled, for the tests that need them."""

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
def s3() -> Iterator[None]:
    """An empty S3 server, told to all by the environment."""
    moto = pytest.importorskip("moto.server", reason="S3 is not tried: moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="S3 is not tried: s3fs is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    s3fs.S3FileSystem.clear_instance_cache()  # of a server before
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    server.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of a few megabytes, or a skip that is hard to overlook."""
    try:
        with small_disk(tmp_path / "disk", megabytes=16) as mounted:
            yield mounted
    except OSError as error:
        pytest.skip(f"A FULL DISK IS NOT TESTED: {error}")
