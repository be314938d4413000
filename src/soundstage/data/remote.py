"""Files at URLs that fsspec knows: S3 and MinIO, Google and Azure storage, SFTP, memory.

Keys, endpoints and regions come from the environment, as each kind has them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

from typing import Any

from soundstage.core.errors import ConfigError, MissingExtra

__all__ = ["filesystem", "is_remote", "listing", "version_of"]

WEB = {"http", "https"}


def is_remote(text: str) -> bool:
    """Whether a text is a URL of another kind than http."""
    scheme, colon, _ = text.partition("://")
    return bool(colon) and scheme.lower() not in WEB and scheme.isidentifier()


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path on it. Raises ConfigError for an unknown kind, MissingExtra."""
    try:
        import fsspec
    except ImportError:
        raise MissingExtra("fsspec", "data") from None
    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = error.name or scheme
        raise MissingExtra({"s3": "s3fs", "s3a": "s3fs"}.get(scheme, package), "cluster") from None
    except ValueError as error:
        raise ConfigError(f"url: {url!r} is of no kind that fsspec knows ({error})") from None


def listing(url: str) -> list[tuple[str, dict[str, Any]]]:
    """(URL, what is known of it) of all files below a prefix, in the order of their names; fresh, not remembered."""
    files, path = filesystem(url)
    files.invalidate_cache()
    found = files.find(path, detail=True)
    return [
        (url.rstrip("/") + name.removeprefix(path.rstrip("/")), info)
        for name, info in sorted(found.items())
        if info.get("type") == "file"
    ]


def version_of(info: dict[str, Any]) -> str:
    """What tells one version of a remote file from the next: its ETag, or its date and size."""
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    date = info.get("LastModified") or info.get("mtime") or info.get("created") or info.get("updated")
    return str(etag).strip('"') if etag else f"{date} {info.get('size')}"
