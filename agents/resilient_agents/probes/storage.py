"""Storage: whether the place of the checkpoints still answers.

Think of knocking: whoever opens is well, whoever does not open is told by the time that we stand there.

Contract: scope "run", where --checkpoint is a directory. Looks at it, writes a small file, brings it to the disk, reads it back, removes
it. An answer that is an error is told at once (read-only, stale, full); one that does not come is told by the engine through `hangs`:
first counted, after `STORAGE_DEAD_S` as "storage-hangs", class "replace". The same on many nodes is the storage's own trouble, and nobody
is replaced for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from typing import TYPE_CHECKING, Final

from resilient.core.messages import Finding
from resilient_agents.probes import limits

if TYPE_CHECKING:
    from resilient.core.messages import Class, Role
    from resilient_agents.probe import Surroundings

NAME: Final = ".resilient-probe-"
WHOSE: Final[dict[int, Class]] = {  # what an error of the file system asks for; any other is counted
    errno.EROFS: "replace",
    errno.EIO: "replace",
    errno.ESTALE: "replace",
    errno.ENODEV: "replace",
    errno.ENOTCONN: "replace",
    errno.ENOSPC: "app-restart",
    errno.EDQUOT: "app-restart",
}


class Storage:
    """Knocks at the checkpoint directory."""

    name = "storage"
    period_s = 30.0
    timeout_s = limits.STORAGE_SLOW_S.value
    scope = "run"
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Which directory it is, the roster says."""
        self.timeout_s = limits.STORAGE_SLOW_S.value  # as it is by now: a policy file may have changed it
        self._roster = surroundings.roster
        self._file = f"{NAME}{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"

    def check(self, now: float) -> list[Finding]:
        """What the answer was."""
        del now
        directory = self._roster().checkpoint
        if not directory:
            return []
        try:
            _knock(directory, self._file)
        except FileNotFoundError:
            return []  # it is made with the first checkpoint
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, str(error.errno))
            class_: Class = WHOSE.get(error.errno or 0, "ignore")
            text = f"{directory}: cannot be written to ({error.strerror})"
            role: Role = "cause" if class_ == "replace" else "context"
            return [
                Finding(seq=0, kind="io-error", layer="storage", code=code, device=f"dev:{directory}", class_=class_, role=role, text=text)
            ]
        return []

    def hangs(self, seconds: float) -> Finding:
        """What it means that there is no answer."""
        directory = self._roster().checkpoint
        dead = seconds >= limits.STORAGE_DEAD_S.value
        text = f"{directory}: no answer to a small write for {seconds:.0f} s"
        return Finding(
            seq=0, kind="storage-hangs", layer="storage", device=f"dev:{directory}", class_="replace" if dead else "ignore", text=text
        )


def _knock(directory: str, name: str) -> None:
    if not stat.S_ISDIR(os.stat(directory).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    path = ""
    try:
        fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)  # nobody ever sees it
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:  # NFS and others do not know it
            raise
        path = os.path.join(directory, name)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        sent = b"knock\n"
        os.write(fd, sent)
        os.fsync(fd)
        if os.pread(fd, 64, 0) != sent:
            raise OSError(errno.EIO, "what was read is not what was written")
    finally:
        os.close(fd)
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)
