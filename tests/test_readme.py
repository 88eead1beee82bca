"""The README's own commands and code do what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

PROGRAM = [sys.executable, "-c", "from resnext_ablate.face.cli import main; main()"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_two_shell_blocks_are_whole_commands() -> None:
    """The two commands each set up all they need; continuous integration runs them."""
    first, second = blocks("bash")
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert first.rstrip().endswith("resnext-ablate run studies/quickstart.toml")
    assert second.rstrip().endswith(".venv/bin/pytest")


@pytest.mark.parametrize(
    "shown",
    [
        block
        for block in blocks("console")
        if re.search(r"^\$ resnext-ablate (match|describe) ", block)
    ],
)
def test_console_block_is_what_the_command_prints(shown: str) -> None:
    """The output shown of `match` and `describe` is the output, to the letter."""
    command, _, output = shown.replace("\\\n", "").partition("\n")
    arguments = command.removeprefix("$ resnext-ablate ").split()
    done = subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == output


def test_every_module_stands_in_the_file_map() -> None:
    """The file map names each module once, and none that is gone."""
    table = README.partition("## File map")[2]
    named = re.findall(r"`(\w+)\.py`", table)
    modules = {path.stem for path in (REPOSITORY / "resnext_ablate").rglob("*.py")}
    assert len(named) == len(set(named))
    assert set(named) - {"test_architecture"} == modules - {"__init__"}


@pytest.mark.slow
def test_python_block_runs_as_printed(tmp_path: Path) -> None:
    """The ten lines for a notebook match, build, run and load tables."""
    (tmp_path / "studies").symlink_to(REPOSITORY / "studies")
    (code,) = blocks("python")
    code = code.replace('"run.seeds=1"]', '"run.seeds=1", "train.epochs=1"]')
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "test_error_pct" in done.stdout
    folder = tmp_path / "results" / "look" / "runs"
    assert len(list(folder.glob("*.json"))) >= 4
