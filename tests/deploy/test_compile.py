"""The wheel: with compiled modules where that is possible, whole without.

What the compiled modules do is tested by tests/run, which runs a part of the tests again
with a wheel that has them.
"""

import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOOK = ROOT / "deploy/compile.py"


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel into `folder`, as pip does once it has what that takes."""
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "warning"),
    [
        ({"CC": "no-such-cc"}, "interpreted: there is no C compiler (no-such-cc)"),
        ({"NBDSERVE_COMPILE": "no"}, None),
    ],
)
def test_without_a_compiler_the_wheel_has_the_modules_as_they_are(
    tmp_path: Path, environment: dict[str, str], warning: str | None
) -> None:
    built = build(tmp_path, **environment)
    assert built.returncode == 0
    if warning is None:
        assert "interpreted" not in built.stdout + built.stderr
    else:
        assert warning in built.stdout + built.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".c"))]
    sources = [
        path for path in ROOT.glob("nbdserve/**/*") if "__pycache__" not in path.parts
    ]
    files = {str(path.relative_to(ROOT)) for path in sources if path.is_file()}
    assert files == {name for name in names if ".dist-info/" not in name}


def test_who_wants_it_compiled_is_told_why_it_is_not(tmp_path: Path) -> None:
    built = build(tmp_path, CC="no-such-cc", NBDSERVE_COMPILE="yes")
    assert built.returncode != 0
    assert (
        "nbdserve can't be compiled: there is no C compiler (no-such-cc)"
        in built.stderr
    )
    assert not list(tmp_path.iterdir())


def test_what_is_neither_yes_nor_no_is_an_error(tmp_path: Path) -> None:
    built = build(tmp_path, NBDSERVE_COMPILE="0")
    assert built.returncode != 0
    assert "NBDSERVE_COMPILE has to be yes or no, not '0'" in built.stderr


def test_what_is_compiled_exists_and_each_module_once() -> None:
    modules = runpy.run_path(str(HOOK))["MODULES"]
    assert len(set(modules)) == len(modules) > 0
    assert not [name for name in modules if not (ROOT / f"nbdserve/{name}.py").exists()]


def test_it_is_compiled_with_the_mypy_that_checks_it() -> None:
    pins = set(re.findall(r"mypy==[0-9.]+", HOOK.read_text()))
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert pins == {each for each in groups["lint"] if each.startswith("mypy=")}


def test_it_is_compiled_without_the_packages_that_it_uses(tmp_path: Path) -> None:
    """As in a new virtual environment: pip builds the wheel before it installs them."""
    hook = runpy.run_path(str(HOOK))
    options = [*hook["MYPY_OPTIONS"], f"--cache-dir={tmp_path}"]
    modules = [f"nbdserve/{name}.py" for name in hook["MODULES"]]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
