"""What a person or a script meets at the command line, whatever the command."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nbdserve as package
from nbdserve import __version__
from nbdserve.cli.main import COMMANDS, main
from nbdserve.server.limits import NAMES

#: What start-up must not pay for: the engine, the loop, the logger.
HEAVY = (
    "asyncio",
    "structlog",
    "uvloop",
    "ssl",
    "backports",
    "typing_extensions",
)
HEAVY_PACKAGES = ("formats", "block", "storage", "server", "exports", "wire", "app")


def nbdserve(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does."""
    return subprocess.run(
        [sys.executable, "-m", "nbdserve", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def modules_loaded_by(*words: str) -> set[str]:
    """Return what a process has imported once it has run `words`."""
    code = (
        "import sys\n"
        "from nbdserve.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return set(result.stderr.split())


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["serve", "--help"], ["image", "--help"]]
)
def test_help_loads_neither_the_engine_nor_structlog(words: list[str]) -> None:
    loaded = modules_loaded_by(*words)
    heavy = {name for name in HEAVY if name in loaded}
    heavy |= {name for name in HEAVY_PACKAGES if f"nbdserve.{name}" in loaded}
    assert not heavy
    assert "nbdserve.cli.main" in loaded


def test_the_version_is_the_packages_and_says_what_runs() -> None:
    how = (
        "compiled"
        if list(Path(package.__file__).parent.glob("wire/requests.*.so"))
        else "interpreted"
    )
    result = nbdserve("--version")
    expected = f"nbdserve {__version__} ({how})\n"
    assert (result.returncode, result.stdout) == (0, expected)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: nbdserve {name} ")
    assert f"examples:\n  nbdserve {name} " in text


@pytest.mark.parametrize("name", ["convert", "compare", "measure"])
def test_help_says_which_uris_a_command_takes(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["image", name, "--help"])
    assert "nbd:// or nbd+unix:// (no TLS)" in " ".join(capsys.readouterr().out.split())


def test_help_names_every_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert set(NAMES) <= set(re.findall(r"[\w-]+", capsys.readouterr().out))


WRONG_USAGE = [
    (["serv"], "did you mean serve?"),
    (["--verison"], "did you mean --version?"),
    (["image", "cheque", "x"], "did you mean image check?"),
    (["frobnicate"], "unknown command 'frobnicate'"),
    (["serve"], "required: [NAME=]IMAGE"),
    (["serve", "x", "--lisen", "y"], "did you mean --listen?"),
    (["serve", "x", "--read"], "unknown option --read"),
    (["serve", "x", "--listen"], "--listen: expected one argument"),
    (["serve", "x", "--format", "qcow3"], "'qcow3' is not one of auto, raw"),
    (["serve", "x", "--format=vmdk"], "'vmdk' is not one of"),
    (["serve", "x", "--create", "10X"], "--create: '10X' is not a size"),
    (["serve", "x", "--listen", "localhost:nbd"], "--listen: 'localhost:nbd'"),
    (["serve", "x", "--cache", "none"], "writeback, writethrough"),
    (["serve", "x", "--log-level", "loud"], "--log-level"),
    (["serve", "a/x", "b/x"], "two exports are named 'x'"),
    (["serve", "x", "--create", "1M", "--read-only"], "exclude each other"),
    (["serve", "x", "y", "--create", "1M"], "--create makes one image"),
    (["serve", "x="], "names no image"),
    (["serve", "x", "--unix", ""], "--unix: the path is empty"),
    (["serve", "x", "--control", ""], "--control: the path is empty"),
    (["serve", "x", "--listen", ""], "--listen: '' is not HOST:PORT"),
    (["serve", "x", "--tls-ca="], "--tls-ca: the path is empty"),
    (["ctl", "--control", "", "list"], "--control: the path is empty"),
    (["image", "create", "", "1M"], "'' is no path for a new image"),
    (["serve", "x", "--limit", "foo"], "'foo' is not NAME=VALUE"),
    (["serve", "x", "--limit", "connection=1"], "did you mean connections?"),
    (["serve", "x", "--limit", "zzz=1"], "'zzz': there are handshake-timeout-s,"),
    (["serve", "x", "--limit", "options=a"], "limit options=a is not a whole number"),
    (["serve", "x", "--limit", "turn-bytes=a"], "limit turn-bytes: 'a' is not a size"),
    (
        ["serve", "x", "--limit", "keepalive-s=40000"],
        "keepalive-s can be at most 32767",
    ),
    (["list"], "required: URI"),
    (["list", "http://x"], "begins with nbd://"),
    (["list", "nbd://x", "y"], "'y' is one argument too many"),
    (["image", "create", "x"], "required: SIZE"),
    (["image", "create", "x", "-5G"], "SIZE: '-5G' is not a size"),
    (["image", "bitmap", "add", "x"], "required: NAME;"),
    (["ctl", "--control", "x"], "required: VERB;"),
    (["image", "amend", "x", "--cluster-size", "1M"], "option --cluster-size;"),
    (["image", "amend", "x", "--refcount-bits", "3"], "2, 4, 8, 16, 32, 64;"),
    (["image", "create", "x", "1M", "--backing", "y"], "--backing-format"),
    (["image", "create", "x", "1M", "--backing-format", "raw"], "needs --backing"),
    (["image", "create", "x", "1M", "--refcount-bits", "3"], "not one of 1, 2, 4"),
    (["image", "info"], "required: PATH"),
    (["image", "check"], "required: PATH"),
    (["image", "check", "--jsno", "x"], "did you mean --json?"),
    (["image", "map", "x", "--output"], "unknown option --output"),
]


@pytest.mark.parametrize(
    ("words", "says"), WRONG_USAGE, ids=[" ".join(w) for w, _ in WRONG_USAGE]
)
def test_wrong_usage_is_one_line_that_helps_and_exit_code_1(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("nbdserve: ")
    assert output.err.count("\n") == 1
    assert says in output.err


@pytest.mark.parametrize("words", [[], ["image"]])
def test_a_missing_command_shows_the_commands_and_fails(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "image check" in output.err


def test_a_failing_process_says_so_in_its_exit_code(tmp_path: Path) -> None:
    result = nbdserve("image", "info", str(tmp_path / "nothing.qcow2"))
    assert result.returncode == 1
    assert result.stdout == ""
    assert "nothing.qcow2: No such file or directory" in result.stderr
    assert "Traceback" not in result.stderr


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Let a shell run what has NBDSERVE in it."""
    program = shlex.join([sys.executable, "-m", "nbdserve"])
    return subprocess.run(
        command.replace("NBDSERVE", program),
        shell=True,
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": ""},  # as people have it
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_reader_that_left_ends_the_command_quietly(tmp_path: Path) -> None:
    assert shell("NBDSERVE --help | true", tmp_path).stderr == ""


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image whose map is longer than any buffer."""
    folder = tmp_path_factory.mktemp("scattered")
    data = b"".join(bytes(4096) + b"x" * 4096 for _ in range(1000))
    (folder / "disk").write_bytes(data)
    words = ["disk", "disk.qcow2", "--cluster-size", "4K"]
    assert nbdserve("image", "convert", *words, cwd=folder).returncode == 0
    return folder


@pytest.mark.parametrize("command", ["map disk.qcow2 --json", "map disk.qcow2", "info"])
def test_output_that_nobody_takes_is_no_fault_of_the_image(
    command: str, scattered: Path
) -> None:
    command = f"NBDSERVE image {command}".replace("info", "info disk.qcow2")
    left = shell(f"{{ {command}; echo $? >&2; }} | true", scattered)
    if "map" in command:
        assert left.stderr == "1\n"
    full = shell(f"{command} >/dev/full", scattered)
    assert full.returncode == 1
    assert full.stderr == "nbdserve: No space left on device\n"


@pytest.mark.parametrize("command", ["list", "image measure", "image compare disk"])
def test_a_host_that_nobody_knows(command: str, scattered: Path) -> None:
    uri = "nbd://nobody.invalid/x"
    result = nbdserve(*command.split(), uri, cwd=scattered)
    assert result.returncode
    assert re.fullmatch(
        r"(?i)nbdserve: nbd://nobody\.invalid:10809: .*name.*\n", result.stderr
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_are_as_dev_null(closed: str, tmp_path: Path) -> None:
    made = shell(f"NBDSERVE image create disk 1M {closed}", tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    told = shell(f"NBDSERVE image info disk {closed}", tmp_path)
    assert (told.returncode, told.stderr) == (0, "")
    wrong = shell(f"NBDSERVE image info missing {closed}", tmp_path)
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr
