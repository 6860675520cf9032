"""Execute the notebooks at full size and keep the outputs, with a fingerprint of their code.

    python notebooks/execute.py

With NOTEBOOK_SIZE=tiny they are small, for trying; the tests execute copies so.
"""

import hashlib
from pathlib import Path

import nbclient
import nbformat

NOTEBOOKS = sorted(Path(__file__).resolve().parent.glob("*.ipynb"))


def code_cells(book: dict) -> list:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def outputs_of(book: dict) -> list:
    return [output for cell in code_cells(book) for output in cell.outputs]


def printed(book: dict) -> str:
    return "".join(output.get("text", "") for output in outputs_of(book))


def source(book: dict) -> str:
    return "\n".join(cell.source for cell in code_cells(book))


def fingerprint(book: dict) -> str:
    return hashlib.sha256(source(book).encode()).hexdigest()


def execute(path: Path) -> dict:
    """The notebook with the outputs of one execution from top to bottom."""
    book = nbformat.read(path, 4)
    nbclient.execute(book, cwd=path.parent, timeout=900, record_timing=False)
    book.metadata["executed"] = fingerprint(book)
    return book


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(execute(path), path)
