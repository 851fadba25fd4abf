"""Compile what runs for each request, while pip builds a wheel.

mypyc (https://mypyc.readthedocs.io) turns modules with types into C extensions that do the
same, so that the interpreter's share of a request gets smaller. It is the same source,
and nothing else changes: where there is no C compiler, or `NBDSERVE_COMPILE=no` says so, the
wheel has the modules as they are. `NBDSERVE_COMPILE=yes` makes it an error if they can't
be compiled. An editable installation never is.
"""

import os
import shutil
import sysconfig
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

#: What a request or its reply passes, and nothing else: a minute of a compiler's time.
MODULES = (
    "block/dirty_bitmap",
    "block/zeros",
    "formats/mapped/allocator",
    "formats/mapped/commit",
    "formats/mapped/entries",
    "formats/mapped/free_runs",
    "formats/mapped/geometry",
    "formats/mapped/inflate",
    "formats/mapped/lend",
    "formats/mapped/mapping",
    "formats/mapped/pieces",
    "formats/mapped/read",
    "formats/mapped/redo",
    "formats/mapped/subclusters",
    "formats/mapped/tables",
    "formats/mapped/waits",
    "formats/mapped/write",
    "formats/qcow2/entries",
    "server/budget",
    "server/buffers",
    "server/bulk",
    "server/busy_poll",
    "server/connection",
    "server/dispatch",
    "server/framing",
    "server/intake",
    "server/outbox",
    "server/session",
    "storage/company",
    "storage/file",
    "storage/folios",
    "storage/pace",
    "storage/uring",
    "wire/answers",
    "wire/replies",
    "wire/requests",
    "wire/validate",
)

#: The types are checked by tests/run. Here the other packages are mostly not installed, and
#: what is compiled should not depend on that: errors in modules that need their types, but
#: are not compiled themselves, are none.
MYPY_OPTIONS = (
    "--config-file=",
    "--no-site-packages",
    "--ignore-missing-imports",
    "--follow-imports=silent",
)


def _wanted() -> str:
    wanted = os.environ.get("NBDSERVE_COMPILE", "")
    if wanted not in {"", "yes", "no"}:
        raise RuntimeError(f"NBDSERVE_COMPILE has to be yes or no, not {wanted!r}")
    return wanted


def _refusal() -> str | None:
    """Say why nothing can be compiled, or None."""
    words = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "").split()
    command = words[0] if words else "cc"
    if shutil.which(command) is None:
        return f"there is no C compiler ({command})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"Python's headers are missing ({header})"


def _compile(root: Path, scratch: Path) -> dict[str, str]:
    """Make the extensions.

    Args:
        root: The folder of pyproject.toml.
        scratch: An empty folder for everything that is made.

    Returns:
        Where each extension is, and its place in the wheel.
    """
    from mypyc.build import mypycify  # noqa: PLC0415 -- see `dependencies`
    from setuptools import Distribution  # noqa: PLC0415
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415

    with chdir(root):  # mypyc takes the names of modules from relative paths
        sources = [f"nbdserve/{name}.py" for name in MODULES]
        extensions = mypycify(
            [*MYPY_OPTIONS, f"--cache-dir={scratch}", *sources],
            debug_level="0",
            opt_level="1",  # as fast as 3 here, and compiled in two thirds of the time
            group_name="nbdserve",
            target_dir=str(scratch / "c"),
        )
        command = build_ext(Distribution({"ext_modules": extensions}))
        command.build_lib = str(scratch / "lib")
        command.build_temp = str(scratch / "objects")
        command.ensure_finalized()
        command.run()
    made = [Path(name) for name in command.get_outputs()]
    return {str(path): str(path.relative_to(scratch / "lib")) for path in made}


class CompileHook(BuildHookInterface[Any]):
    """Adds the extensions to a wheel, or says why it is built without."""

    def dependencies(self) -> list[str]:
        """Ask for what the compiling takes, only where it is done."""
        if _wanted() == "no" or _refusal() is not None:
            return []
        return ["mypy==2.4.1", "setuptools>=80"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See https://hatch.pypa.io/latest/plugins/build-hook/reference/.

        Raises:
            RuntimeError: `NBDSERVE_COMPILE` is "yes", and it can't be done, or is something
                else than "yes" and "no".
        """
        if version == "editable" or _wanted() == "no":
            return
        refusal = _refusal()
        if refusal is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="nbdserve-")
            try:
                made = _compile(Path(self.root), Path(self._scratch.name))
            except (Exception, SystemExit) as error:  # noqa: BLE001 -- whatever compilers say
                refusal = f"mypyc or the C compiler failed: {error!r}"
            else:
                build_data["pure_python"] = False
                build_data["infer_tag"] = True
                build_data["force_include"].update(made)
        if refusal is not None:
            if _wanted() == "yes":
                raise RuntimeError(f"nbdserve can't be compiled: {refusal}")
            self.app.display_warning(f"nbdserve will be interpreted: {refusal}")

    def finalize(
        self, version: str, build_data: dict[str, Any], artifact_path: str
    ) -> None:
        """Remove what is in the wheel by now."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()
