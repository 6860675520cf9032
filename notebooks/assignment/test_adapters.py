"""The grader as a test run. From the repository root: python -m pytest -q notebooks/assignment

R2D_ADAPTERS names another file than adapters.py, R2D_GRADE_SEED other random inputs (default 0).
The report stands at the end of the output, and in R2D_GRADE_DIR (default: this folder) as
grade.txt and grade.json.
"""

import json
import os
from pathlib import Path

import pytest
from checks import PROBLEMS
from grade import HERE, grade_file, report, write


class AtTheEnd:
    """Prints the report whatever pytest captures."""

    def __init__(self, text: str) -> None:
        self.text = text

    def pytest_terminal_summary(self, terminalreporter: object) -> None:
        terminalreporter.write_line("\n" + self.text)


@pytest.fixture(scope="session")
def result(request: pytest.FixtureRequest) -> dict:
    """Everything is graded once, before the first test."""
    path = Path(os.environ.get("R2D_ADAPTERS", HERE / "adapters.py"))
    folder = Path(os.environ.get("R2D_GRADE_DIR", HERE))
    graded = grade_file(path, int(os.environ.get("R2D_GRADE_SEED", "0")), closed=[])
    write(folder / "grade.json", json.dumps(graded, indent=2) + "\n")
    write(folder / "grade.txt", report(graded) + "\n")
    request.config.pluginmanager.register(AtTheEnd(report(graded)))
    return graded


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem(problem: str, result: dict) -> None:
    """All checks of the problem hold. What is wrong stands in the report below."""
    one = result["problems"][problem]
    if one["failed"]:
        points = f"{one['points']} of {one['of']} points: {one['failed'][0]}"
        pytest.fail(points, pytrace=False)
