"""Where a ledger's tables lie: an embedded SQLite file, or a PostgreSQL server that several hosts share."""

from __future__ import annotations

import functools
import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from soundstage.core.errors import MissingExtra, SoundstageError
from soundstage.data.store import DiskFull, is_full

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table
    from sqlalchemy.exc import DBAPIError

__all__ = ["Database", "LedgerError", "network_disk", "plain", "tables"]

T = TypeVar("T")
VERSION = "1"
BUSY_SECONDS = 60.0
"""How long one writer of a SQLite file waits for another."""
OPEN_SECONDS = 20.0
"""How long a server that does not answer is waited for at the beginning."""
PATIENCE_SECONDS = 300.0
"""How long a server that went away is waited for."""
NETWORK = {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "ocfs2", "gfs2"}
NETWORK_FUSE = {"sshfs", "s3fs", "glusterfs", "gcsfuse", "juicefs", "rclone", "goofys", "mount-s3", "seaweedfs"}
AGAIN = ("08", "57P", "40001", "40P01", "53300")
"""SQLSTATE of what passes: lost connections, a restart, deadlocks, too many connections."""
PASSING = ("starting up", "shutting down", "recovery", "too many", "administrator")
"""Words of the same kind where a connection is refused, which has no SQLSTATE."""
LOCK = 0x534F554E44
"""PostgreSQL's advisory lock of a ledger: shared by commits, exclusive for making tables and for cleaning the store."""


class LedgerError(SoundstageError, RuntimeError):
    """A ledger cannot be opened, reached or used."""


@functools.cache
def tables() -> SimpleNamespace:
    """The tables by name; made once, since SQLAlchemy is optional.

    A task is (stage, key); key is an item's id, or for a gather a hash of its members' ids. An output without a reason
    was kept. `gathering` holds which groups are current for a gather after these very stages.
    """
    try:
        import sqlalchemy as sa
    except ImportError:
        raise MissingExtra("sqlalchemy", "data") from None
    meta = sa.MetaData()

    def table(name: str, *columns: Any) -> Table:  # noqa: ANN401
        return sa.Table(name, meta, *columns, sqlite_with_rowid=name in ("item", "stage"))

    def key(name: str, kind: Any = sa.Text) -> sa.Column:  # noqa: ANN401
        return sa.Column(name, kind, primary_key=True, autoincrement=False)

    def text(name: str, *, null: bool = False) -> sa.Column:
        return sa.Column(name, sa.Text, nullable=null)

    real = functools.partial(sa.Column, type_=sa.Double)
    count = functools.partial(sa.Column, type_=sa.BigInteger, nullable=False)
    found = SimpleNamespace(
        meta=meta,
        about=table("about", key("name"), text("value")),
        stage=table(
            "stage",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("signature", sa.Text, unique=True, nullable=False),
            text("name"),
            text("told"),
        ),
        item=table("item", key("id"), text("files"), text("facts")),
        source=table("source", key("item"), real("added", nullable=False)),
        file=table("file", key("path"), count("size"), count("changed"), text("digest")),
        blob=table("blob", key("name"), count("size")),
        task=table(
            "task",
            key("stage", sa.Integer),
            key("key"),
            text("state"),
            count("attempts"),
            real("not_before", nullable=False),
            text("owner", null=True),
            text("ticket", null=True),
            text("reason", null=True),
            real("score"),
            real("seconds"),
            text("error", null=True),
        ),
        output=table(
            "output",
            key("stage", sa.Integer),
            key("key"),
            key("position", sa.Integer),
            text("item"),
            text("reason", null=True),
            real("score"),
        ),
        member=table("member", key("key"), key("position", sa.Integer), text("item")),
        gathering=table("gathering", key("prefix"), text("fingerprint")),
        grouping=table("grouping", key("prefix"), key("key")),
        owner=table("owner", key("id"), text("host"), text("process"), real("until", nullable=False)),
    )
    pending, held = found.task.c.state == "pending", found.task.c.state == "held"
    columns = found.task.c
    sa.Index("task_pending", columns.stage, columns.not_before, sqlite_where=pending, postgresql_where=pending)
    sa.Index("task_held", columns.owner, columns.stage, sqlite_where=held, postgresql_where=held)
    sa.Index("output_item", found.output.c.item)
    sa.Index("member_item", found.member.c.item)
    return found


class Database:
    """Transactions that are tried again where a server went away; each must be safe to run twice."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.embedded = engine.dialect.name == "sqlite"
        self._ahead = 0.0
        self._inserts: dict[str, Any] = {}

    @classmethod
    def open(cls, where: str | Path) -> Database:
        """A PostgreSQL URL, or the path of a SQLite file, made where it is missing; raises LedgerError."""
        found = tables()  # first, since it says what to install
        import sqlalchemy as sa

        server = "://" in str(where)
        database = cls(_server(str(where)) if server else _embedded(Path(where)))

        def work(c: Connection) -> str:
            database.exclude(c)
            found.meta.create_all(c)
            c.execute(database.insert(found.about).values(name="version", value=VERSION).on_conflict_do_nothing())
            return c.execute(sa.select(found.about.c.value).where(found.about.c.name == "version")).scalar_one()

        version = database._do(work, "durable", OPEN_SECONDS)
        if version != VERSION:
            raise LedgerError(f"{where}: this ledger has version {version}, not {VERSION}; use its Soundstage")
        database.set_clock()
        return database

    def write(self, work: Callable[[Connection], T], *, durable: bool = True) -> T:
        """One transaction, again from its beginning where the connection was lost.

        durable: on the disk when this returns. What is not, such as a claim, is lost where the power fails, no more.
        """
        return self._do(work, "durable" if durable else "quick")

    def read(self, work: Callable[[Connection], T]) -> T:
        """One transaction that only reads."""
        return self._do(work, "read")

    def insert(self, table: Table) -> Any:  # noqa: ANN401
        """INSERT with ON CONFLICT, in this database's words."""
        if self.embedded:
            from sqlalchemy.dialects.sqlite import insert
        else:
            from sqlalchemy.dialects.postgresql import insert
        return insert(table)

    def add(self, c: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
        """Insert rows, leaving those that are there; in the order of their keys, so that hosts do not deadlock."""
        if rows:
            names = [column.name for column in table.primary_key]
            if table.name not in self._inserts:
                self._inserts[table.name] = self.insert(table).on_conflict_do_nothing()
            c.execute(self._inserts[table.name], sorted(rows, key=lambda row: [row[name] for name in names]))

    def share(self, c: Connection) -> None:
        """Keep the store from being cleaned until the end of this transaction."""
        self._lock(c, "pg_advisory_xact_lock_shared")

    def exclude(self, c: Connection) -> None:
        """Keep commits out until the end of this transaction."""
        self._lock(c, "pg_advisory_xact_lock")

    def _lock(self, c: Connection, name: str) -> None:
        if not self.embedded:  # SQLite has one writer anyway
            import sqlalchemy as sa

            c.execute(sa.select(getattr(sa.func, name)(LOCK)))

    def now(self) -> float:
        """Seconds since 1970, by the clock that all hosts of the ledger share."""
        return time.time() + self._ahead

    def set_clock(self) -> None:
        """Learn by how much the server's clock is ahead of ours."""
        if not self.embedded:
            import sqlalchemy as sa

            told = self.read(lambda c: c.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
            self._ahead = float(told) - time.time()

    def close(self) -> None:
        """Give back the connections."""
        self.engine.dispose()

    @contextmanager
    def _begin(self, kind: str) -> Iterator[Connection]:
        with self.engine.connect().execution_options(soundstage_kind=kind) as c, c.begin():
            if kind == "quick" and not self.embedded:
                c.exec_driver_sql("SET LOCAL synchronous_commit TO off")
            yield c

    def _do(self, work: Callable[[Connection], T], kind: str, patience: float = PATIENCE_SECONDS) -> T:
        from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError

        start, pause = time.monotonic(), 0.05
        while True:
            try:
                with self._begin(kind) as c:
                    return work(c)
            except DBAPIError as error:
                folder = Path(self.engine.url.database).parent if self.embedded else None
                if _full(error, folder):
                    raise DiskFull(folder or "the PostgreSQL server of the ledger") from error
                over = time.monotonic() - start > patience
                if self.embedded or over or not _passes(error):
                    if type(error) not in (OperationalError, DatabaseError):
                        raise  # a defect of ours
                    raise LedgerError(f"{self._name}: {_said(error)}") from error
            self.engine.dispose()
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 5.0)

    @property
    def _name(self) -> str:
        url = self.engine.url
        return f"ledger {url.database if self.embedded else url.render_as_string(hide_password=True)}"


def _passes(error: DBAPIError) -> bool:
    """Is it worth to try again? A server that turns us away for good says FATAL, and nothing of starting."""
    state = getattr(error.orig, "sqlstate", None)
    if error.connection_invalidated or (state or "").startswith(AGAIN):
        return True
    lost = type(error.orig).__name__ in ("OperationalError", "InterfaceError") and state is None
    return lost and ("FATAL" not in str(error.orig) or any(word in str(error.orig) for word in PASSING))


def _said(error: DBAPIError) -> str:
    return " ".join(plain(str(error.orig)).split())


def _full(error: DBAPIError, folder: Path | None) -> bool:
    if getattr(error.orig, "sqlstate", None) == "53100":
        return True
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return True
    return code is not None and code & 0xFF == sqlite3.SQLITE_IOERR and folder is not None and is_full(None, folder)


def _embedded(path: Path) -> Engine:
    import sqlalchemy as sa

    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = network_disk(path)
    if kind is not None:
        raise LedgerError(
            f"{path}: it is on a network disk ({kind}), where SQLite loses data; keep the ledger on a disk of this "
            "machine (--ledger PATH), or in PostgreSQL for several hosts (--ledger postgresql://HOST/NAME)"
        )
    url = sa.URL.create("sqlite", database=str(path))
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS, "isolation_level": None})

    @sa.event.listens_for(engine, "connect")
    def settings(connection: sqlite3.Connection, _: object) -> None:
        for each in ("journal_mode=WAL", "temp_store=MEMORY", "cache_size=-65536"):
            connection.execute(f"PRAGMA {each}")

    @sa.event.listens_for(engine, "begin")
    def begin(c: Connection) -> None:
        kind = c.get_execution_options().get("soundstage_kind")
        if kind != "read" and c.info.get("kind") != kind:
            c.exec_driver_sql(f"PRAGMA synchronous={'FULL' if kind == 'durable' else 'NORMAL'}")
            c.info["kind"] = kind
        c.exec_driver_sql("BEGIN" if kind == "read" else "BEGIN IMMEDIATE")

    return engine


def _server(url: str) -> Engine:
    import sqlalchemy as sa

    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise MissingExtra("psycopg", "cluster") from None
    try:
        told = sa.make_url(url)
    except sa.exc.ArgumentError:
        told = None
    if told is None or told.get_backend_name() not in ("postgresql", "postgres"):
        raise LedgerError(f"ledger: {url!r} is neither a path nor a URL such as postgresql://USER@HOST/NAME")
    return sa.create_engine(told.set(drivername="postgresql+psycopg"), connect_args={"connect_timeout": 10})


def network_disk(path: Path, mounts: str | None = None) -> str | None:
    """The kind of network file system that a path lies on, such as "nfs4"; None on a disk of this machine.

    mounts: as /proc/mounts has them, which is read where this is None.
    """
    if mounts is None:
        table = Path("/proc/mounts")
        mounts = table.read_text(encoding="utf-8", errors="surrogateescape") if table.exists() else ""
    real, best, kind = path.resolve(), -1, ""
    for fields in (line.split() for line in mounts.splitlines()):
        if len(fields) < 3:
            continue
        place = Path(fields[1].encode("utf-8", "surrogateescape").decode("unicode_escape", "replace"))
        if real.is_relative_to(place) and len(place.parts) >= best:  # of two mounts in one place, the later is seen
            best, kind = len(place.parts), fields[2]
    family, _, name = kind.partition(".")
    return kind if kind in NETWORK or (family == "fuse" and name in NETWORK_FUSE) else None


def plain(text: str) -> str:
    """Text as every database can hold it."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def portions(values: Iterable[T], size: int = 500) -> Iterator[list[T]]:
    """Values in lists that fit into one statement."""
    values = list(values)
    for start in range(0, len(values), size):
        yield values[start : start + size]
