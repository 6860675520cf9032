"""Grade one file, or a folder of submissions: the automatic part of the assignment.

    python notebooks/assignment/grade.py                         adapters.py beside this file
    python notebooks/assignment/grade.py ann.py --seed 3         another file, other random inputs
    python notebooks/assignment/grade.py hand-ins --csv all.csv  a class; a row per submission
    python notebooks/assignment/grade.py F --gradescope R.json   in Gradescope's format

A graded file runs in a child process (worker.py), which gets inputs and returns values; the
expected values stay here. The limits are computing time, not time of the clock, so that a busy
machine changes no grade.
"""

import argparse
import ast
import csv
import io
import json
import os
import platform
import queue
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from checks import CHECKS, PROBLEMS, WrongError, points_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOTAL = sum(map(points_of, PROBLEMS))
BY_HAND = 30  # points of the experiment and the written questions
SECONDS = 20  # of computing, for one call
WAITING = 300  # seconds on the clock for one call: for what sleeps, and where there is no CPU limit
GIBIBYTES = 2  # what a graded file may allocate beside torch, on Linux
# Closed to graded code: this folder, and in the repository whatever holds a solution.
SOLUTIONS = ["r2d.py", "model.py", "data.py", "metrics.py", "__pycache__", "tests", "notebooks"]
SOLUTIONS += [".git"]


class StoppedError(Exception):
    """The child has ended, or had to be ended; the text says why."""


class Child:
    """worker.py, ready for one graded file."""

    def __init__(self, closed: list[Path], seconds: float = SECONDS, waiting: float = WAITING):
        """Raises StoppedError if Python cannot run it, for instance without torch."""
        self.seconds, self.waiting = seconds, waiting
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        closed = [HERE, *closed]
        if (ROOT / "r2d.py").exists():
            closed += [ROOT / name for name in SOLUTIONS]
        allowed = {"PATH", "HOME", "SYSTEMROOT", "APPDATA", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
        allowed |= {"PYTHONPATH", "CONDA_PREFIX", "DYLD_LIBRARY_PATH", "LANG"}
        environment = {name: os.environ[name] for name in allowed & os.environ.keys()}
        command = [sys.executable, HERE / "worker.py", GIBIBYTES, *closed]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.home.name,
            env=environment | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that what it starts can be ended with it
        )
        self.lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        ready = self.receive(0, time.monotonic() + WAITING)
        if "fatal" in ready:
            self.stop()
            raise StoppedError(f"{ready['fatal']}; run pip install -r requirements.txt")
        self.torch = ready["torch"]

    def read(self) -> None:
        """In a thread of its own: lines of the child, and an empty one at their end."""
        while line := self.process.stdout.readline():
            self.lines.put(line)
        self.lines.put(b"")

    def stop(self) -> None:
        if os.name == "posix":
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it has ended
        self.process.kill()
        self.process.wait()
        self.home.cleanup()

    def receive(self, number: int, deadline: float) -> dict:
        """The next message of the child about request `number`."""
        while True:
            try:
                line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                self.stop()
                raise StoppedError("no answer in time: does it wait for something?") from None
            if not line:
                status = self.process.wait()
                self.stop()
                if os.name == "posix" and status == -signal.SIGXCPU:
                    hint = "an endless loop, or far too slow?"
                    raise StoppedError(f"more than {self.seconds:g} seconds of computing: {hint}")
                raise StoppedError("the process ended: os._exit, a crash, or out of memory?")
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                continue  # graded code may write into the pipe itself
            if isinstance(message, dict) and message.get("id") == number:
                return message

    def ask(self, request: dict, answer: Callable | None = None) -> dict:
        """Send a request; `answer` replies to what the function under test calls back."""
        number = secrets.randbits(60)  # not to be guessed, for the same reason
        message = {"id": number, "seconds": self.seconds, **request}
        deadline = time.monotonic() + self.waiting
        while True:
            try:
                self.process.stdin.write(json.dumps(message).encode() + b"\n")
                self.process.stdin.flush()
            except OSError:
                pass  # it has ended: `receive` says how
            reply = self.receive(number, deadline)
            if "ask" not in reply:
                return reply
            try:
                message = {"value": answer(*reply["ask"])}
            except Exception as error:  # a WrongError, or arguments of a kind nobody expects
                message = {"error": str(error) or type(error).__name__}


@dataclass(frozen=True)
class Answer:
    values: list  # what each call returned
    arguments: list  # as the function left them
    seen: dict  # what else was noticed

    @property
    def value(self) -> object:
        return self.values[0]


class Student:
    """Calls functions of the graded file in the child."""

    def __init__(self, child: Child, seed: str):
        self.child = child
        self.rng = random.Random(seed)

    def __call__(
        self,
        function: str,
        *arguments: object,
        repeat: int = 1,
        grad: bool = True,
        answer: Callable | None = None,
    ) -> Answer:
        """Raises NotImplementedError, WrongError or StoppedError if there is no answer."""
        request = {"call": function, "arguments": arguments, "repeat": repeat, "grad": grad}
        reply = self.child.ask(request, answer)
        raise_error(reply)
        return Answer(reply["values"], reply["arguments"], reply)


def raise_error(reply: dict) -> None:
    message = reply.get("message", "")
    if reply.get("error") == "NotImplementedError" and not message:
        raise NotImplementedError
    if "error" in reply:
        where = f" (line {reply['line']})" if reply.get("line") else ""
        raise WrongError(f"raised {reply['error']}{where}: {message}")


def notes_on(source: str) -> list[str]:
    """What a person should look at: imports and calls that the handout does not allow."""
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy"}
    allowed -= {"builtins", "code", "ctypes", "gc", "importlib", "inspect", "io", "marshal"}
    allowed -= {"multiprocessing", "os", "pathlib", "pickle", "readline", "resource", "runpy"}
    allowed -= {"signal", "socket", "sqlite3", "subprocess", "sys", "threading"}
    calls = {"__import__", "compile", "eval", "exec", "globals", "open", "vars", "__builtins__"}
    attributes = {"__closure__", "__globals__", "_getframe", "f_locals", "from_file", "ctypes"}
    attributes |= {"sys", "modules"}
    notes = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            if name.split(".")[0] not in allowed:
                notes.append(f"line {node.lineno} imports {name}")
        if isinstance(node, ast.Name) and node.id in calls:
            notes.append(f"line {node.lineno} uses {node.id}")
        if isinstance(node, ast.Attribute) and node.attr in attributes:
            notes.append(f"line {node.lineno} uses {node.attr}")
    return sorted(set(notes), key=lambda note: int(note.split()[1]))


class Grader:
    """Grades one file. The child is started when it is needed, and again after it has ended."""

    def __init__(self, source: str, name: str, seed: int, closed: list[Path], **limits: float):
        self.source, self.name, self.seed = source, name, seed
        self.closed, self.limits = closed, limits
        self.child: Child | None = None

    def load(self) -> None:
        """A child with the file loaded. Raises WrongError, NotImplementedError, StoppedError."""
        if self.child is None or self.child.process.poll() is not None:
            self.child = Child(self.closed, **self.limits)
        raise_error(self.child.ask({"load": self.name, "source": self.source}))

    def grade_problem(self, problem: str) -> dict:
        """{points, of, failed: hints}. Without the core, the first check, there are no points."""
        points = 0
        failed = []
        for i, one in enumerate(CHECKS[problem]):
            hint = ""
            try:
                if self.child.process.poll() is not None:
                    self.load()
                one.run(Student(self.child, f"{self.seed} {problem} {i}"))
                points += one.points
            except NotImplementedError:
                hint = "not written yet"
            except (WrongError, StoppedError) as error:
                hint = " ".join(str(error).split())[:300]
            except Exception as error:  # an answer of a form that the check did not foresee
                hint = f"an answer of another form ({type(error).__name__})"
            if hint:
                worth = "the core" if i == 0 else f"{one.points} of {points_of(problem)} points"
                failed.append(f"{one.title} ({worth}): {hint}")
            if hint and i == 0:  # without the core there are no points
                break
        return {"points": points, "of": points_of(problem), "failed": failed}

    def grade(self) -> dict:
        """The whole report, as in grade.json."""
        trouble = ""
        notes = []
        try:
            notes = notes_on(self.source)
            self.load()
        except (WrongError, StoppedError) as error:
            trouble = f"the file cannot be loaded: {error}"
        except Exception as error:  # such as a SyntaxError
            trouble = f"the file cannot be loaded: {type(error).__name__}: {error}"
        trouble = " ".join(trouble.split())[:300]
        problems = {}
        for problem in PROBLEMS:
            if trouble:
                problems[problem] = {"points": 0, "of": points_of(problem), "failed": [trouble]}
            else:
                problems[problem] = self.grade_problem(problem)
        points = sum(one["points"] for one in problems.values())
        result = {"file": self.name, "points": points, "of": TOTAL, "by_hand": BY_HAND}
        result |= {"problems": problems, "trouble": trouble, "notes": notes, "seed": self.seed}
        if self.child is not None:
            self.child.stop()
            result["versions"] = {"python": platform.python_version(), "torch": self.child.torch}
        return result


def grade_file(path: Path, seed: int, closed: list[Path], **limits: float) -> dict:
    """Grade one file. Whatever it holds, there is a report."""
    try:
        if path.is_symlink() or path.stat().st_size > 10**6:
            raise ValueError("it is a link, or larger than 1 MB")
        source = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        source = f"raise OSError({message!r})"
    return Grader(source, str(path), seed, closed, **limits).grade()


def report(result: dict) -> str:
    """The result for people."""
    lines = [f"{result['file']}: the automatic part", ""]
    for problem, one in result["problems"].items():
        lines.append(f"{problem:26}{one['points']:3} of {one['of']}")
        if not result["trouble"]:
            lines += [f"    - {hint}" for hint in one["failed"]]
    by_hand = f"and {result['by_hand']} points by hand"
    lines += ["", f"{'total':26}{result['points']:3} of {result['of']}   {by_hand}"]
    if result["trouble"]:
        lines.append(result["trouble"])
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines).encode("ascii", "replace").decode()  # any console can show it


def gradescope(result: dict) -> dict:
    """The result in the format of Gradescope's results.json."""
    tests = []
    for problem, one in result["problems"].items():
        status = "passed" if one["points"] == one["of"] else "failed"
        output = "\n".join(one["failed"]) or "all checks hold"
        test = {"name": problem, "score": one["points"], "max_score": one["of"], "status": status}
        tests.append(test | {"output": output, "visibility": "visible"})
    hidden = {"name": "for the instructor", "visibility": "hidden"}  # names no points
    hidden["output"] = "\n".join(result["notes"]) or "nothing to look at"
    output = result["trouble"] or f"{result['points']} of {result['of']} points"
    return {"score": result["points"], "output": output, "tests": [*tests, hidden]}


def submissions(folder: Path) -> dict[str, Path]:
    """Name -> file: each .py in the folder, and each folder with one adapters.py in it."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):  # .git, __MACOSX
            continue
        if path.is_dir() and not path.is_symlink():
            inside = sorted(path.rglob("adapters.py"))
            found[path.name] = inside[0] if len(inside) == 1 else path / "adapters.py"
        elif path.suffix == ".py":
            found[path.name] = path
    return found


def write(path: Path, text: str) -> None:
    """Under another name first, so that the file is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    temporary.replace(path)


def grade_class(folder: Path, target: Path, seed: int, jobs: int) -> None:
    """Grade every submission in a folder, several at a time, into one CSV file."""
    found = submissions(folder)
    names = list(found)

    def one(name: str) -> dict:
        return grade_file(found[name], seed, closed=[folder.resolve()])

    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["name", "points", *PROBLEMS, "trouble", "notes"])
    with ThreadPoolExecutor(jobs) as pool:
        for name, result in zip(names, pool.map(one, names), strict=True):
            points = [problem["points"] for problem in result["problems"].values()]
            texts = [name, result["trouble"], "; ".join(result["notes"])]
            for i, text in enumerate(texts):
                if text[:1] in ("=", "+", "-", "@"):  # a spreadsheet would compute it
                    texts[i] = "'" + text
            rows.writerow([texts[0], result["points"], *points, *texts[1:]])
            print(f"{result['points']:3} of {TOTAL}  {name}", flush=True)
    write(target, table.getvalue())
    print(f"{len(names)} submissions, in {target}")


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 graded, whatever the points; 2 bad input."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("grade.py", argparse.SUPPRESS, __doc__, formatter_class=style)
    parser.add_argument("path", type=Path, nargs="?", default=HERE / "adapters.py")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    parser.add_argument("--csv", type=Path, help="for a folder: the table to write")
    parser.add_argument("--jobs", type=int, default=2, help="for a folder: so many at a time")
    parser.add_argument("--gradescope", type=Path, help="for a file: results.json to write")
    o = parser.parse_args(arguments)
    try:
        if o.path.is_dir() != (o.csv is not None):
            raise ValueError("give a folder and --csv, or a file without it")
        if o.csv:
            grade_class(o.path, o.csv, o.seed, max(o.jobs, 1))
            return 0
        if not o.gradescope and not o.path.is_file():  # Gradescope wants a report even so
            raise ValueError("there is no such file")
        result = grade_file(o.path, o.seed, closed=[])
        print(report(result))
        if o.gradescope:
            write(o.gradescope, json.dumps(gradescope(result), indent=2))
    except (OSError, ValueError, StoppedError) as error:
        print(f"grade.py: {o.path}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
