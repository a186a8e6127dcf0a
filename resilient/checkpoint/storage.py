"""Storage: bytes under a URL, on any place fsspec opens (a directory, s3://, gs://, memory:// ...).

Think of a goods lift: it knows nothing of what is in the crates, only how to bring them up quickly and whether they arrived.

Contract: paths are relative to the URL. A file is there whole or not at all: a local one is written under another name, fsynced, renamed,
and its directory fsynced; an object store shows an object when its upload is complete. Errors of storage are TierUnavailable with the URL;
what is not there is FileNotFoundError. Blocks: whoever must not wait calls it from a thread. Any number of threads at once.
How files are written and read: output.py, local.py, remote.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from resilient.checkpoint import local, remote
from resilient.checkpoint.output import Output, put
from resilient.errors import TierUnavailable

# what drivers raise that is no OSError, as far as they are loaded
_FAILURES: Final = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("botocore.parsers", "ResponseParserError"),
    ("aiohttp", "ClientError"),
    ("urllib3.exceptions", "HTTPError"),
    ("http.client", "HTTPException"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)

_WILD: Final = frozenset("*?[")


class Input(Protocol):
    """A file that is there."""

    num_bytes: int

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` on. Raises SnapshotCorrupt if the file is too short."""
        ...


class Storage:
    """What lies under one URL."""

    def __init__(self, url: str, wanted: Callable[[], bool] = lambda: True) -> None:
        """Nothing is opened yet but fsspec's own driver. Raises TierUnavailable if there is none for such a URL.

        wanted: whether somebody still waits for what this thread does. What hung and was given up must not change anything afterwards.
        """
        self.url = url
        self._wanted = wanted
        try:
            fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)  # other nodes write there too
        except (ImportError, ValueError, TypeError, AttributeError, OSError) as error:  # drivers say in many ways what a URL lacks
            raise TierUnavailable(f"checkpoint URL {url!r}: {error}") from error
        self._fs: Any = fs
        self._root = str(root).rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)
        if self._local and (file := local.in_the_way(self._root)):
            raise TierUnavailable(f"checkpoint URL {url!r}: a directory expected, a file found ({file})")

    def where(self, path: str) -> str:
        """For people."""
        return f"{self._root}/{path}"

    # ------------------------------------------------------------------ writing

    @contextlib.contextmanager
    def writing(self, path: str, about_bytes: int = 0) -> Iterator[Output]:
        """A new file, in place when the block ends without an exception. about_bytes: how large it will be, roughly."""
        where = self.where(path)
        with self._answering():
            try:
                with self._file(where, about_bytes) as output:
                    yield output
                    output.finish()
                    self._still_wanted()
            except FileNotFoundError as error:  # no such bucket, or somebody has removed the directory
                raise TierUnavailable(f"checkpoint URL {self.url!r}: {error}") from error

    def _file(self, where: str, about_bytes: int) -> contextlib.AbstractContextManager[Output]:
        return local.writing(where) if self._local else remote.writing(self._fs, where, about_bytes, _failures())

    def _still_wanted(self) -> None:
        if not self._wanted():
            raise TierUnavailable(f"checkpoint URL {self.url!r}: it took so long that it was given up")

    def write(self, path: str, data: bytes) -> None:
        """A small file."""
        with self.writing(path) as output:
            put(output, data)

    def remove(self, path: str) -> None:
        """Nothing happens if it is not there."""
        with self._answering(), contextlib.suppress(FileNotFoundError):
            self._still_wanted()
            self._fs.rm_file(self.where(path))

    def remove_tree(self, path: str) -> None:
        """All below `path`."""
        where = self.where(path)
        with self._answering(), contextlib.suppress(FileNotFoundError):
            self._still_wanted()
            if self._local or _WILD.isdisjoint(where):
                self._fs.rm(where, recursive=True)
                return
            for file in self._fs.find(where):  # many drivers' `rm` would take it for a pattern, and remove what is another run's
                self._fs.rm_file(file)
            self._fs.rmdir(where)

    # ------------------------------------------------------------------ reading

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes start .. end of a file; fewer if it is shorter."""
        where, data = self.where(path), b""
        with self._answering():
            if start == 0 and end is None:
                data = self._fs.cat_file(where)
            elif start < (stop := min(end or 1 << 62, int(self._fs.size(where)))):  # object stores refuse what begins behind the end
                data = self._fs.cat_file(where, start=start, end=stop)
        return data

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """(path, start, end), at least one byte of each there: as many at a time as the driver can."""
        paths, starts, ends = (list(column) for column in zip(*ranges, strict=True))
        with self._answering():
            found: list[bytes] = self._fs.cat_ranges([self.where(path) for path in paths], starts, ends, on_error="raise")
        return found

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[Input]:
        """A file, for many reads."""
        with self._answering():
            file = local.LocalInput(self.where(path)) if self._local else remote.RemoteInput(self._fs, self.where(path))
            try:
                yield file
            finally:
                file.close()

    def size(self, path: str) -> int:
        """Bytes of a file."""
        with self._answering():
            return int(self._fs.size(self.where(path)))

    def exists(self, path: str) -> bool:
        """Whether that file is there."""
        with self._answering():
            return bool(self._fs.exists(self.where(path)))

    def names(self, path: str = "") -> tuple[str, ...]:
        """What lies directly below `path`, none if that is not there."""
        return tuple(sorted(self.sizes(path)))

    def sizes(self, path: str = "") -> dict[str, int]:
        """Bytes of each file directly below `path`, by name, in one request for many; of a directory something."""
        with self._answering():
            try:
                found = self._fs.ls(self.where(path).rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
        return {str(entry["name"]).rstrip("/").rpartition("/")[2]: int(entry["size"] or 0) for entry in found}

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except _failures() as error:
            raise TierUnavailable(f"checkpoint URL {self.url!r}: {str(error) or type(error).__name__}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What a storage that does not answer as it should raises."""
    found = [getattr(sys.modules.get(module), name, None) for module, name in _FAILURES]
    return OSError, *(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))
