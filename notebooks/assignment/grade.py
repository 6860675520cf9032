"""Grade method.py, another file, or a class: the automatic part of the assignment.

    python grade.py                            method.py beside this file
    python grade.py ann.py --seed 3            another file, other drawn inputs
    python grade.py hand-ins --csv all.csv     a class: a .py file, or a folder with one, for each
    python grade.py FILE --gradescope R.json   in Gradescope's format

The graded file runs in a process of its own, with limits. They stop accidents: endless loops, full
memory, large files. They stop no cheat: the checks run in that process, too. Grade what others
wrote in a container, and read it.
"""

import argparse
import ast
import csv
import faulthandler
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = 10  # of the clock, for the checks of one function; right ones take 0.3
GIBIBYTES = 2  # of memory beside torch's own; Linux alone
MEGABYTES = 16  # of a file that the graded code writes; Linux and macOS
TOTAL = 70
PACKAGES = {"torch", "numpy"}  # what graded code may import beside Python's own library


def load(path: Path) -> types.ModuleType:
    """The graded file as a module."""
    spec = importlib.util.spec_from_file_location("method", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- The process of the graded file


def set_limits() -> None:
    """Memory and the size of files; time is limited for each function by `child`."""
    try:
        import resource
    except ImportError:  # Windows
        return
    size = MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    in_use = Path("/proc/self/statm")
    if in_use.exists():  # Linux
        pages = int(in_use.read_text(encoding="ascii").split()[0])
        size = pages * resource.getpagesize() + GIBIBYTES * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def child(path: Path, seed: int, functions: list[str]) -> None:
    """Check some functions of a file, or all. Prints a line of JSON with all checks, and then for
    each function one with its hints."""
    import torch
    from checks import CHECKS, hint_of

    torch.set_num_threads(1)
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    table = [[one.function, one.concept, one.points] for one in CHECKS]
    print(json.dumps(["checks", table]), file=results, flush=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what the graded code prints
    set_limits()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    student = load(path)  # an error here ends the child, and its last line is the report
    os.dup2(nowhere, 2)
    for function in functions or dict.fromkeys(one.function for one in CHECKS):
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # ends the process; starts anew here
        hints = {}
        for one in CHECKS:
            if one.function == function:
                hints[one.concept] = hint_of(one, student, seed)
        print(json.dumps([function, hints]), file=results, flush=True)
    os._exit(0)  # without waiting for threads of the graded code


def results_of(path: Path, seed: int, functions: list[str]) -> dict:
    """What a child printed: the checks, and the hints of the functions before one that ended it.

    Raises ValueError if the file cannot be loaded.
    """
    command = [sys.executable, HERE / "grade.py", path.resolve(), "--seed", seed, "--child"]
    command += functions
    longest = 60 + SECONDS * 15  # 60 to start torch on a busy machine
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        try:
            output, errors = process.communicate(timeout=longest)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
    results = {}
    for line in output.decode(errors="replace").splitlines():
        name, value = json.loads(line)
        results[name] = value
    if len(results) < 2 and errors:
        raise ValueError(errors.decode(errors="replace").strip().splitlines()[-1])
    return results


# ---- Grading


def missing_packages(source: str) -> list[str]:
    """A line for each import that fails where the hand-in is graded."""
    known = set(sys.stdlib_module_names) | PACKAGES
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            if name.split(".")[0] not in known:
                found.append(f"line {node.lineno} imports {name}: it is not there for grading")
    return found


def grade(path: Path, seed: int) -> dict:
    """The report on a file: points, and for each function its points and its failed checks."""
    results: dict = {}
    trouble = ""
    try:
        found = missing_packages(path.read_text(encoding="utf-8-sig"))
        if found:
            raise ValueError("; ".join(found))
        results = results_of(path, seed, [])
        functions = list(dict.fromkeys(function for function, _, _ in results["checks"]))
        left = [function for function in functions if function not in results]
        while left:  # the first of these ended the child: the next child begins after it
            results[left.pop(0)] = {}
            if left:
                results |= results_of(path, seed, left)
            left = [function for function in functions if function not in results]
    except (OSError, ValueError, SyntaxError, KeyError) as error:
        trouble = f"the file cannot be graded: {' '.join(str(error).split())[:300]}"
    report = {"file": str(path), "points": 0, "trouble": trouble, "functions": {}}
    stopped = f"ended its process, or took more than {SECONDS} seconds"
    for function, concept, points in results.get("checks", []):
        one = report["functions"].setdefault(function, {"points": 0, "of": 0, "failed": []})
        hint = results[function].get(concept, stopped)
        one["of"] += points
        if hint:
            one["failed"].append(f"{concept} ({points}): {hint}")
        else:
            one["points"] += points
            report["points"] += points
    return report


# ---- Reports


def as_text(report: dict) -> str:
    lines = []
    for function, one in report["functions"].items():
        lines.append(f"{function:24}{one['points']:3} of {one['of']}")
        for failed in one["failed"]:
            if not failed.endswith("not written yet"):
                lines.append(f"    {failed}")
    lines.append(f"{'total':24}{report['points']:3} of {TOTAL}")
    lines.append(report["trouble"])
    return "\n".join(lines).strip().encode("ascii", "replace").decode()


def as_gradescope(report: dict) -> dict:
    """What Gradescope reads from results.json."""
    tests = []
    for function, one in report["functions"].items():
        text = "\n".join(one["failed"]) or "all checks hold"
        score = {"score": one["points"], "max_score": one["of"]}
        tests.append({"name": function, "output": text, **score})
    return {"score": report["points"], "output": report["trouble"], "tests": tests}


def grade_class(folder: Path, target: Path, seed: int) -> None:
    """A row for each .py file, and for each folder with a method.py somewhere in it."""
    rows = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "__")):
            path = next(iter(sorted(path.rglob("method.py"))), path / "method.py")
        if path.suffix == ".py":
            report = grade(path, seed)
            row = {"file": str(path.relative_to(folder)), "points": report["points"]}
            for function, one in report["functions"].items():
                row[function] = one["points"]
            rows.append(row | {"trouble": report["trouble"]})
            print(f"{report['points']:3} of {TOTAL}  {row['file']}", file=sys.stderr)
    if not rows:
        raise ValueError("no .py file, and no folder with one")
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, max(map(list, rows), key=len))
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """The exit status: 0 graded, whatever the points; 2 bad input."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("grade.py", description=__doc__, formatter_class=style)
    parser.add_argument("path", type=Path, nargs="?", default=HERE / "method.py")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn inputs (default 0)")
    parser.add_argument("--csv", type=Path, help="for a class: the table to write")
    parser.add_argument("--gradescope", type=Path, help="results.json to write")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.child is not None:
        child(o.path, o.seed, o.child)
    try:
        if o.csv:
            grade_class(o.path, o.csv, o.seed)
            return 0
        report = grade(o.path, o.seed)
        print(as_text(report))
        if o.gradescope:
            content = json.dumps(as_gradescope(report), indent=2)
            o.gradescope.write_text(content, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"grade.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
