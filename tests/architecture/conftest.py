"""What the architecture tests read: the files of the repository and the modules of the package."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT = {"__pycache__", "build", "dist", "outputs", "runs"}


def _listed() -> list[Path]:
    """Files of the work tree that git does not ignore; without git, those outside hidden and built folders."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        return sorted(path for name in set(names) if name and (path := ROOT / name).is_file())
    return sorted(path for path in ROOT.rglob("*") if path.is_file() and not _built(path.relative_to(ROOT)))


def _built(path: Path) -> bool:
    return any(part in BUILT or part.startswith(".") for part in path.parts[:-1])


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def files() -> list[Path]:
    """Every file that is, or would be, committed."""
    return _listed()


@pytest.fixture(scope="session")
def modules() -> dict[str, Path]:
    """Dotted name of each module of the package to its file."""
    source = ROOT / "src"
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found
