"""Build hook: compile resilient/checkpoint/stream.c next to it, where there is a C compiler.

Think of a tailor who also sharpens his scissors if there is a stone: without one he sews as well, only not as fast.

Contract: part of `pip install`, editable or not. The result is a plain shared library (ctypes loads it), not bound to a version of
Python; a wheel with it is for this platform, one without it for any. No compiler, another processor, an error of the compiler: said,
and left out.
$CC names the compiler (cc).
"""

from __future__ import annotations

import os
import pathlib
import platform
import shutil
import subprocess
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROCESSORS = ("x86_64",)  # others have a memcpy that streams by itself, or nobody has tried
COMPILER_S = 60.0


class StreamBuildHook(BuildHookInterface):
    """Called by hatchling for every wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  hatchling's signature
        """Compile, and tell hatchling what there is besides Python."""
        source = pathlib.Path(self.root, "resilient", "checkpoint", "stream.c")
        target = source.with_name(f"_stream.{platform.machine()}.so")
        if self.target_name != "wheel" or platform.machine() not in PROCESSORS:
            return
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            self.app.display_warning("no C compiler: snapshots are copied by libc's memmove")
            return
        made = target.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(made), str(source)]
        try:
            subprocess.run(  # noqa: S603  the command is ours
                command, check=True, capture_output=True, text=True, timeout=COMPILER_S
            )
        except (subprocess.SubprocessError, OSError) as error:
            self.app.display_warning(f"{error}: {getattr(error, 'stderr', '')}\nsnapshots are copied by libc's memmove")
            made.unlink(missing_ok=True)
            return
        made.replace(target)
        platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(f"/{target.relative_to(self.root)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag}"
