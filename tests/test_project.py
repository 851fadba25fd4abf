"""What holds for the whole project: its shape, and that its documents are true."""

import ast
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from nbdserve.cli.main import COMMANDS
from nbdserve.cli.parser import Parser
from tests.cli.servers import run, serving

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nbdserve"

TOP_LEVEL = {
    "Dockerfile",
    "LICENSE",
    "README.md",
    "deploy",
    "nbdserve",
    "pyproject.toml",
    "tests",
}

#: Names that say nothing about what a module is for.
EMPTY_NAMES = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}

DOCUMENTS = [ROOT / "README.md", ROOT / "deploy/README.md", PACKAGE / "ARCHITECTURE.md"]


def committed() -> list[str]:
    """Return every file under version control."""
    command = ["git", "-C", str(ROOT), "ls-files"]
    return subprocess.check_output(command, text=True, timeout=30).splitlines()


def test_nothing_else_at_top_level() -> None:
    names = {Path(name).parts[0] for name in committed()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_modules_are_named_for_what_they_do() -> None:
    names = {path.stem for path in PACKAGE.rglob("*")}
    assert not names & EMPTY_NAMES


def test_every_module_says_why_it_exists() -> None:
    silent = [
        path
        for path in PACKAGE.rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_nothing_is_left_for_later() -> None:
    marks = re.compile("TO" r"DO|FIX" r"ME|NotImpl" r"emented")
    unfinished = [
        name
        for name in committed()
        if marks.search((ROOT / name).read_text(errors="replace"))
    ]
    assert not unfinished


@pytest.mark.parametrize("module", ["nbdserve", "nbdserve.cli.main"])
def test_importing_the_package_loads_no_engine(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.check_output(
        [sys.executable, "-c", code], text=True, timeout=30
    ).split()
    assert not {name for name in loaded if name.startswith("nbdserve.formats")}
    assert "structlog" not in loaded


# Documents


def code_blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_paths_of_the_code_exist(path: Path) -> None:
    names = re.findall(r"`([\w./]+/[\w./]*\.py)`", path.read_text())
    existing = [f"/{name}" for name in committed()]
    missing = [
        name
        for name in names
        if not any(real.endswith(f"/{name}") for real in existing)
    ]
    assert not missing


def commands_in_documents() -> list[str]:
    """Return every `nbdserve ...` command that a reader may paste."""
    texts = [
        line
        for path in DOCUMENTS[:2]
        for block in code_blocks(path, "sh")
        for line in block.splitlines()
    ]
    texts += [
        span
        for path in DOCUMENTS[:2]
        for span in re.findall(r"(?<!`)`(nbdserve [^`]+)`", path.read_text())
    ]
    texts += [
        line
        for module, _ in COMMANDS.values()
        for line in str(import_module(module).EXAMPLES).splitlines()
    ]
    commands = {
        found[1].strip()
        for text in texts
        if (found := re.search(r"(?:^|/|\s)(nbdserve (?:serve|list|image) .*)", text))
    }
    return sorted(commands)


@pytest.mark.parametrize("command", commands_in_documents())
def test_the_commands_of_the_documents_are_understood(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    if words[-1] in {"--help", "..."}:
        return
    count = 2 if words[0] == "image" else 1
    name = " ".join(words[:count])
    module = import_module(COMMANDS[name][0])
    parser = Parser(name, takes="", description="", epilog="")
    module.define(parser)
    parser.parse([word for word in words[count:] if word != "\\"])


def test_the_readme_can_be_followed_on_one_disk(tmp_path: Path) -> None:
    """What it does to disk.qcow2 in one place is no obstacle in the next."""
    readme = ROOT / "README.md"
    lines = [
        line.partition("#")[0].strip()
        for block in code_blocks(readme, "sh")
        for line in block.splitlines()
    ]

    def follow(pattern: str, **replaced: str) -> None:
        for line in filter(re.compile(pattern).match, lines):
            words = [replaced.get(word, word) for word in shlex.split(line)[1:]]
            done = run(*words, cwd=tmp_path)
            assert done.returncode == 0, f"{line}: {done.stderr}"

    follow(r"nbdserve image (create|snapshot create|bitmap add) disk\.qcow2")
    socket = "/run/nbdserve/control.sock"
    words = ["disk.qcow2", "--unix", "s", "--control", "control"]
    with serving(*words, cwd=tmp_path):
        follow("nbdserve ctl ", **{socket: "control"})
    (example,) = code_blocks(readme, "python")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    told = [
        f"b'hello' {20 << 30}",
        "[(458752, 65536)]",
        "[b'before', b'before-upgrade', b'marked']",
    ]
    assert (result.stdout.splitlines(), result.stderr) == (told, "")


def test_the_image_is_built_from_files_that_exist() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
