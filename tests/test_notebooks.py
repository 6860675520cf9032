"""The notebooks: executed at the size that NOTEBOOK_SIZE=tiny asks for, what is kept of them."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from execute import NOTEBOOKS, code_cells, execute, fingerprint, outputs_of, printed, source
from helpers import ROOT

import r2d

CORE = [ROOT / name for name in ("r2d.py", "model.py", "data.py", "metrics.py")]
USAGE = (ROOT / "notebooks" / "usage.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch) -> None:
    """Catches a core that changed under a notebook, a cell that needs another's files; in notebook
    3, which trains nothing, kept numbers that are not those of results/."""
    for file in CORE:
        shutil.copy(file, tmp_path)
    shutil.copytree(path.parent, tmp_path / "nb", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.setenv("NOTEBOOK_SIZE", "tiny")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = execute(tmp_path / "nb" / path.name)
    assert [out.text for out in outputs_of(book) if out.get("name") == "stderr"] == []
    if path.stem == "03_compare":
        assert printed(book) == printed(nbformat.read(path, 4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_belong_to_the_code(path: Path) -> None:
    """Catches a cell changed after the outputs were made, old numbers, and a machine's paths."""
    book = nbformat.read(path, 4)
    assert not outputs_of(book) or book.metadata.get("executed") == fingerprint(book)
    assert not re.search("/home/|/tmp/|/root/|/Users/|runs/tiny", printed(book))
    shown = printed(book) + source(book)
    prose = "".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    numbers = re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])|\d+(?= ?%)", re.sub("`[^`]*`", "", prose))
    assert [number for number in numbers if number not in shown] == []


def test_they_redefine_nothing_of_the_core() -> None:
    """Catches a copy of the core in a notebook, which would soon differ from it; a method that has
    another colour in one notebook than in the next."""
    core = "\n".join([file.read_text(encoding="utf-8") for file in CORE])
    own = "\n".join([source(nbformat.read(path, 4)) for path in NOTEBOOKS])
    names = [set(re.findall(r"^(?:def|class) (\w+)", text, re.M)) for text in (core, own)]
    assert len(NOTEBOOKS) == 4 and names[0] and names[1] and not names[0] & names[1]
    assert "draw.METHODS" in own and not re.search("#[0-9A-F]{6}|colors?=.?(C[0-9]|tab:)", own)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_open_in_colab(path: Path, tmp_path: Path) -> None:
    """Catches a first cell that does not fetch or install, and one that does so elsewhere."""
    repository = tmp_path / "repository"
    shutil.copytree(path.parent, repository / "notebooks", ignore=shutil.ignore_patterns("runs"))
    for file in [*CORE, ROOT / "requirements.txt"]:
        shutil.copy(file, repository)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(repository)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    first = code_cells(nbformat.read(path, 4))[0].source
    assert first.count('REPOSITORY = ""') == 1
    cell = first.replace('REPOSITORY = ""', f"REPOSITORY = {str(repository)!r}")
    after = "\nimport pathlib; print(pathlib.Path.cwd().name, pathlib.Path('../r2d.py').exists())"
    colab = "import sys, types; sys.modules['google.colab'] = types.ModuleType('colab')\n"
    for before, place in (("", f"{tmp_path.name} False"), (colab, "notebooks True")):
        code = [sys.executable, "-c", before + cell + after]
        assert subprocess.check_output(code, cwd=tmp_path, text=True).strip() == place


@pytest.mark.parametrize("command", re.findall(r"^python r2d\.py (.*)", USAGE, re.M))
def test_every_command_of_usage_has_options_that_exist(command: str, tmp_path: Path) -> None:
    """Catches an option that left."""
    r2d.parse_args([*shlex.split(command, comments=True), "--out", str(tmp_path)])
