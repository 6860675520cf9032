"""The notebooks: executed at the size that NOTEBOOK_SIZE=tiny asks for, and what is committed of them."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_r2d import ROOT, TINY

import r2d

nbformat = pytest.importorskip("nbformat")  # notebooks/requirements.txt; CI has it
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CORE = ("r2d.py", "model.py", "data.py", "metrics.py")


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def printed(path: Path) -> str:
    outputs = [output for cell in cells(path, "code") for output in cell.outputs]
    return "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch) -> None:
    """Catches a core that changed under a notebook, and a cell that needs the files of another notebook."""
    for name in CORE:
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns("runs", ".*"))
    monkeypatch.setenv("NOTEBOOK_SIZE", "tiny")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(folder / path.name, 4)
    resources = {"metadata": {"path": folder}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=resources).execute()
    assert not any(output.output_type == "error" for cell in book.cells for output in cell.get("outputs", []))


def test_there_are_four() -> None:
    """Catches a test of nothing."""
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_the_outputs_of_one_clean_execution(path: Path) -> None:
    """Catches outputs of cells run in disorder, with an error, a warning or somebody's paths, or without pictures."""
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not re.search(r"/home/|/tmp/|/root/|/Users/|runs/tiny", printed(path))
    assert path.stat().st_size < 800_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_text_agrees_with_its_outputs(path: Path) -> None:
    """Catches a number in the text that no output shows any more."""
    prose = "\n".join(re.sub(r"`[^`]*`|\(.*?\d{4}\)|arXiv \S+", "", cell.source) for cell in cells(path, "markdown"))
    shown = printed(path) + "\n".join(cell.source for cell in cells(path, "code"))
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])|\d+(?= ?%)", prose)
    assert [number for number in numbers if number not in shown] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_redefines_nothing_of_the_core(path: Path) -> None:
    """Catches a copy of the core in a notebook, which would soon differ from it."""
    core = {
        node.name
        for name in CORE
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    own = {
        node.name
        for cell in cells(path, "code")
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert not own & core, own & core


def test_the_pictures_of_the_readme_can_be_drawn(tmp_path: Path) -> None:
    """Catches files of a run, or of a comparison, that the pictures' program no longer understands."""
    assert r2d.main([*TINY, "--out", str(tmp_path / "run")]) == 0
    for source in (tmp_path / "run", ROOT / "notebooks" / "results" / "compare.json"):
        command = [sys.executable, ROOT / "notebooks" / "draw.py", source, tmp_path / "picture.png"]
        subprocess.run(command, check=True, timeout=120)
        picture = (tmp_path / "picture.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
        (tmp_path / "picture.png").unlink()
