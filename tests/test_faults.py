"""Fault tolerance: kills, signals, full disks, damaged files, two runs at once. Every test says which bug it catches.

Torch takes seconds to import, so the processes that are killed are not started one by one: `nursery` is one process
without threads and without a graphics card that forks them (this file, run as a program).
"""

import ast
import builtins
import errno
import io
import itertools
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import contents, lines

import r2d

ROOT = Path(__file__).resolve().parent.parent
# Validations after steps 3 and 6 of stage 1 and 3, 6, 9, 12 of stage 2, where stage2.pt can be saved at 9 and 12.
TINY = "--limit 32 --stage1-steps 6 --stage2-steps 12 --eval-every 3 --batch-size 8 --width 32 --heads 2 --layers 1"
TINY = [*TINY.split(), "--lr", "0.1", "--vocab-size", "400", "--max-target", "16", "--device", "cpu"]
CHECKPOINTS = ("stage1.pt", "stage2.pt", "last.pt")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and fork")


@pytest.fixture(scope="module", autouse=True)
def notes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Notes so easy that a few steps change every score: what is lost or repeated then shows."""
    path, rng = tmp_path_factory.mktemp("notes") / "notes.jsonl", random.Random(0)
    path.write_text("\n".join(json.dumps(note(rng)) for _ in range(160)), encoding="utf-8")
    TINY.extend(["--data", str(path)])
    yield
    del TINY[-2:]


def note(rng: random.Random) -> dict[str, str]:
    part, bad = rng.choice(["arm", "leg", "head", "back", "hand", "foot"]), rng.choice([True, False])
    question = f"{'bad' if bad else 'mild'} {part} {rng.randrange(100)}"
    return {"question": question, "label": "go" if bad else "stay", "rationale": f"the {part} is {question.split()[0]}"}


def run(out: Path, *arguments: str) -> int:
    return r2d.main([*TINY, "--out", str(out), *arguments])


def messages(text: str) -> list[str]:
    """The lines of stderr that are no progress bar."""
    return [line for line in text.replace("\r", "\n").split("\n") if line.strip() and "%|" not in line]


def refused(status: int, stderr: str, *named: str) -> bool:
    """Exit status 2 and one line that names what is wrong; `note:` lines may stand before it."""
    *notes, message = messages(stderr) or [""]
    told = message.startswith("r2d.py: ") and all(name in message for name in named)
    return status == 2 and told and all(note.startswith("note: ") for note in notes)


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def log_of(out: Path) -> list[dict]:
    """log.jsonl without the clock."""
    rows = lines(out / "log.jsonl")
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def same_training(out: Path, reference: Path) -> bool:
    """Weights, optimiser, random states, place and scores of all checkpoints. The log's size depends on the clock."""
    pairs = ([load(folder / name) | {"log_size": 0} for folder in (out, reference)] for name in CHECKPOINTS)
    return all(equal(*pair) for pair in pairs)


def check_same(out: Path, reference: Path) -> None:
    """The run ended as the uninterrupted one did, to the bit, and left no half-written file."""
    assert same_training(out, reference)
    assert log_of(out) == log_of(reference)
    assert load(out / "last.pt")["log_size"] == (out / "log.jsonl").stat().st_size
    for name in ("predictions.jsonl", "metrics.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    assert not list(out.glob("*.tmp"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(out) == 0
    assert (
        len(log_of(out)) == 18 and load(out / "stage2.pt")["step"] == 12 and log_of(out)[-1]["used_predicted"]
    )  # or little can go wrong
    return out


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped by Ctrl-C in step 10 of 12 of stage 2: last.pt from there, previous.pt from step 9."""
    out = tmp_path_factory.mktemp("halted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 10, lambda: signal.raise_signal(signal.SIGINT))
        assert run(out) == 130
    assert load(out / "last.pt")["step"] == 11 and load(out / "previous.pt")["step"] == 9
    return out


@pytest.fixture
def stopped(halted: Path, tmp_path: Path) -> Path:
    """A copy of `halted` to go on with."""
    return Path(shutil.copytree(halted, tmp_path / "run"))


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "done"))


def at_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Call `act` at the beginning of that step of stage 2."""
    real = r2d.gradients

    def gradients(one: r2d.Run, stage: int, step: int, *rest: object) -> dict:
        if (stage, step) == (2, number):
            act()
        return real(one, stage, step, *rest)

    patch.setattr(r2d, "gradients", gradients)


# --- processes that are killed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(target: str, number: int, act: Callable[[], object], after: bool = False, only: str = "") -> None:
    """In the process at hand: `act` before (or after) the call of that number of module.function with `only` in it."""
    module, name = target.split(".")
    real, calls = getattr(sys.modules[module], name), itertools.count(1)

    def wrapper(*arguments: object, **named: object) -> object:
        now = only in str(arguments) and next(calls) == number
        if now and not after:
            act()
        result = real(*arguments, **named)
        if now and after:
            act()
        return result

    setattr(sys.modules[module], name, wrapper)


class HalfFile(io.FileIO):
    """Takes half of the bytes; then its `end` comes."""

    end = staticmethod(die)

    def write(self, content: bytes) -> int:
        super().write(content[: len(content) // 2])
        self.end()
        return len(content)


def half_open(name: str, number: int, kind: type[io.FileIO] = HalfFile) -> Callable:
    """An `open` that gives a HalfFile for the write of that number to the file `name` (or its temporary name)."""
    calls, real = itertools.count(1), open

    def opener(file: object, mode: str = "r", *rest: object, **named: object) -> object:
        if "w" in mode and Path(file).name.startswith(name) and next(calls) == number:
            return kind(file, "w")
        return real(file, mode, *rest, **named)

    return opener


def after_events(number: int) -> None:
    """Die at a moment that is random in the program and yet the same on every machine: count calls and returns."""
    left = itertools.count(number, -1)
    sys.setprofile(lambda *_: None if next(left) else die())


def hold(target: str, number: int, marker: str) -> None:
    """Stand still in that call, after making the file `marker`, until the file `marker`.go is made."""

    def wait() -> None:
        Path(marker).touch()
        deadline = time.monotonic() + 30
        while not Path(f"{marker}.go").exists():
            if time.monotonic() > deadline:
                os._exit(98)  # the test that should have ended this is gone
            time.sleep(0.01)

    at_call(target, number, wait)


FATES = {
    "none": lambda: None,
    "half": lambda name, number=1: [setattr(module, "open", half_open(name, number)) for module in (builtins, io)],
    "before": lambda target, number=1, only="": at_call(target, number, die, only=only),
    "after": lambda target, number=1, only="": at_call(target, number, die, after=True, only=only),
    "events": after_events,
    "hold": hold,
}


def child(order: dict) -> None:
    """The life of a forked process: its fate, then r2d.main, or the whole program with its signal handlers."""
    status = 99
    try:
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fate, *details = order["fate"]
        FATES[fate](*details)
        if order["program"]:
            sys.argv = ["r2d.py", *order["arguments"]]
            runpy.run_path(str(ROOT / "r2d.py"), run_name="__main__")
        status = r2d.main(order["arguments"])
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def forks() -> None:
    """The nursery: JSON in, numbers out. An order is answered by a pid, a pid by how that process ended."""
    torch.set_num_threads(1)
    r2d.tqdm.monitor_interval = 0  # no thread of its own
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, int):
            print(os.waitpid(order, 0)[1], file=answers, flush=True)
        elif order["fate"] == ["warm"]:  # what torch loads at its first run, it loads once for all
            print(r2d.main(order["arguments"]), file=answers, flush=True)
        elif pid := os.fork():
            print(pid, file=answers, flush=True)
        else:
            child(order)


class Nursery:
    def __init__(self, process: subprocess.Popen, folder: Path):
        self.process, self.output = process, folder / "output"

    def tell(self, order: object) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, out: Path, *arguments: str, fate: tuple = ("none",), program: bool = False) -> int:
        order = {"arguments": [*TINY, "--out", str(out), *arguments], "fate": fate, "program": program}
        return self.tell(order | {"output": str(self.output)})

    def wait(self, pid: int) -> tuple[int, str]:
        """Its exit status, or minus the signal that killed it, and all it said."""
        status = self.tell(pid)
        return os.waitstatus_to_exitcode(status), self.output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("nursery")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, __file__], env=env, text=True, encoding="utf-8", **pipes) as process:
        one = Nursery(process, folder)
        assert one.start(folder / "warm", fate=("warm",)) == 0
        yield one
        process.stdin.close()


# Moments in the order in which a run comes by: each is reached from where the kill before it left the run.
MOMENTS = [
    ("half", "config.json"),
    ("before", "r2d.stage1_loss", 2),
    ("before", "r2d.nll_counts"),  # validation of stage 1
    ("half", "last.pt"),  # the first save: nothing to go back to
    ("before", "os.replace", 1, "last.pt.tmp"),  # all is written, nothing has its name yet
    ("after", "r2d.save_checkpoint", 2, "stage1.pt"),  # the best weights are newer than last.pt
    ("after", "os.replace", 1, "previous.pt"),  # last.pt is gone, previous.pt is there
    ("before", "r2d.load_weights"),  # the end of stage 1
    ("before", "r2d.restore", 2),  # the beginning of stage 2
    ("before", "metrics.macro_f1"),  # validation of stage 2
    ("half", "last.pt", 3),
    ("half", "stage2.pt"),
    ("before", "metrics.rationale_scores", 2),  # evaluation
    ("half", "predictions.jsonl"),
    ("before", "r2d.write_json", 1, "metrics.json"),
    ("half", "metrics.json"),
]


def kill_again_and_again(nursery: Nursery, out: Path, fates: list[tuple], *arguments: str) -> int:
    """The number of kills that were kills, after which the run went on to its end."""
    kills = 0
    for fate in fates:
        if fate[0] == "delay":
            pid = nursery.start(out, *arguments)
            time.sleep(fate[1])
            os.kill(pid, signal.SIGKILL)
        else:
            pid = nursery.start(out, *arguments, fate=fate)
        status, said = nursery.wait(pid)
        assert status == -signal.SIGKILL, (fate, status, said)
        kills += 1
    status, said = nursery.wait(nursery.start(out, *arguments))
    assert status == 0, said
    return kills


@posix
def test_twenty_kills_leave_no_trace(nursery: Nursery, finished: Path, tmp_path: Path) -> None:
    """Catches a resume that loses or repeats anything: weights, optimiser, dropout, coins, place, best score, log."""
    rng = random.Random(0)
    by_chance = [("before", "r2d.token_mean", rng.randrange(2, 5)), ("delay", rng.uniform(0.02, 0.1))]
    # preparing and evaluating alone take more than 300,000 events, so each of these strikes before the end
    by_chance += [("events", rng.randrange(300_000)) for _ in range(2)]
    assert run(tmp_path / "dropout", "--dropout", "0.2") == 0
    kills = kill_again_and_again(nursery, tmp_path / "one", MOMENTS, "--dropout", "0.2")
    kills += kill_again_and_again(nursery, tmp_path / "two", by_chance)
    assert kills == 20
    check_same(tmp_path / "one", tmp_path / "dropout")
    check_same(tmp_path / "two", finished)


@posix
def test_a_kill_right_after_the_first_stage1_checkpoint_does_not_cut_stage_1_short(
    nursery: Nursery, finished: Path, tmp_path: Path
) -> None:
    """Catches a half-trained stage1.pt, saved before there is a last.pt, that is taken for one of another run."""
    assert kill_again_and_again(nursery, tmp_path / "run", [("after", "r2d.save_checkpoint", 1, "stage1.pt")]) == 1
    check_same(tmp_path / "run", finished)


@posix
def test_a_stage1_checkpoint_of_another_run_survives_a_kill(nursery: Nursery, finished: Path, tmp_path: Path) -> None:
    """Catches a stage1.pt laid into the folder that is taken for half-trained, and trained again, after a kill."""
    (tmp_path / "run").mkdir()
    for name in ("stage1.pt", "tokenizer.model"):
        shutil.copy(finished / name, tmp_path / "run" / name)
    fates = [("before", "r2d.stage2_loss", 2), ("half", "last.pt"), ("before", "r2d.stage2_loss", 2)]
    assert kill_again_and_again(nursery, tmp_path / "run", fates) == 3
    assert (tmp_path / "run" / "stage1.pt").read_bytes() == (finished / "stage1.pt").read_bytes()
    assert same_training(tmp_path / "run", finished) and log_of(tmp_path / "run") == log_of(finished)[6:]


@posix
def test_a_kill_at_the_very_beginning_leaves_nothing_to_other_data(nursery: Nursery, tmp_path: Path) -> None:
    """Catches a tokenizer that a run killed in its first moment leaves to a run on other data in that folder."""
    other = tmp_path / "other.jsonl"
    rows = [note(random.Random(i)) | {"question": f"quite another question {i}"} for i in range(160)]
    other.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run(tmp_path / "reference", "--data", str(other), "--stage", "1") == 0
    for i, fate in enumerate([("half", "tokenizer.model"), ("half", "config.json"), ("after", "r2d.write_file", 1)]):
        out = tmp_path / str(i)
        assert nursery.wait(nursery.start(out, fate=fate))[0] == -signal.SIGKILL
        status = run(out, "--data", str(other), "--stage", "1")
        raw = [(folder / "tokenizer.model").read_bytes() for folder in (out, tmp_path / "reference") if status == 0]
        assert (status == 0 and raw[0] == raw[1]) or status == 2


@posix
def test_a_kill_while_the_old_run_is_moved_aside_loses_nothing(nursery: Nursery, done: Path, finished: Path) -> None:
    """Catches --fresh that deletes before it has moved, or cannot be given again."""
    before = contents(done)
    assert kill_again_and_again(nursery, done, [("before", "r2d.start")], "--fresh") == 1
    old = [done.with_name(f"done.old{i}") for i in (1, 2)]
    assert contents(old[0]) == before and not any((old[1] / name).exists() for name in before.keys() - {"lock"})
    check_same(done, finished)


def test_early_stopping_counts_across_an_interruption(tmp_path: Path, monkeypatch) -> None:
    """Catches a resume that forgets how often the score was no better, or which score was the best."""
    real, calls = r2d.stage1_loss, itertools.count(1)

    def loss(*arguments: object) -> Iterator:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(r2d, "stage1_loss", loss)
    monkeypatch.setattr(r2d, "validate", lambda one, stage: (1.0, {"val_loss": -1.0}))
    command = ["--stage", "1", "--eval-every", "1"]
    assert run(tmp_path / "run", *command) == 130 and load(tmp_path / "run" / "last.pt")["worse"] == 2
    assert run(tmp_path / "run", *command) == 0
    assert len(log_of(tmp_path / "run")) == 4  # the best is the first; patience 3
    assert load(tmp_path / "run" / "stage1.pt")["step"] == 1


# --- signals


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number: int, nursery: Nursery, finished: Path, tmp_path: Path
) -> None:
    """Catches a signal that loses the step, a traceback, and a save that cannot be resumed to the bit."""
    out, marker = tmp_path / "run", tmp_path / "marker"
    pid = nursery.start(out, fate=("hold", "data.pad", 4, str(marker)), program=True)
    wait_for(marker)
    os.kill(pid, number)
    marker.with_name("marker.go").touch()
    status, said = nursery.wait(pid)
    assert status == 130 and "Traceback" not in said and "the same command again goes on" in messages(said)[-1]
    assert load(out / "last.pt")["step"] == 2  # no validation was due
    assert log_of(out) == log_of(finished)[:2] and not list(out.glob("*.tmp"))
    assert r2d.main(["--out", str(out)]) == 0
    check_same(out, finished)


@posix
def test_a_second_ctrl_c_ends_at_once(nursery: Nursery, stopped: Path, finished: Path, tmp_path: Path) -> None:
    """Catches a step that cannot be left: the second signal ends it, and what was saved before stays as it is."""
    before, marker = contents(stopped), tmp_path / "marker"
    pid = nursery.start(stopped, fate=("hold", "data.pad", 1, str(marker)), program=True)
    wait_for(marker)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)  # two signals at the same moment would be one
    os.kill(pid, signal.SIGINT)
    status, said = nursery.wait(pid)  # the file that lets it go on never comes
    assert status == 130 and "Traceback" not in said and "stopped" in said
    assert all(contents(stopped)[name] == before[name] for name in ("last.pt", "previous.pt", "stage1.pt", "stage2.pt"))
    assert run(stopped) == 0
    check_same(stopped, finished)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_evaluation_ends_without_traceback(
    number: int, nursery: Nursery, stopped: Path, finished: Path, tmp_path: Path
) -> None:
    """Catches SIGTERM that is handled in training only, and an evaluation that half counts as finished."""
    marker = tmp_path / "marker"
    pid = nursery.start(stopped, fate=("hold", "metrics.rationale_scores", 1, str(marker)), program=True)
    wait_for(marker)
    os.kill(pid, number)
    status, said = nursery.wait(pid)
    assert status == 130 and "Traceback" not in said and "stopped" in messages(said)[-1]
    assert not (stopped / "metrics.json").exists()
    assert run(stopped) == 0
    check_same(stopped, finished)


@pytest.mark.parametrize("form", [["--compare", "sft"], ["--compare=sft"]])
def test_ctrl_c_in_a_comparison_says_to_give_the_same_command_again(form: list, tmp_path: Path, capsys) -> None:
    """Catches the advice to go on with one run of a comparison, or in a folder that is none."""
    command = [*TINY, *form, "--seeds", "0", "--out", str(tmp_path / "c")]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        assert r2d.main(command) == 130
    assert "the same command again" in messages(capsys.readouterr().err)[-1]
    assert r2d.main(command) == 0 and "goes on at step 5" in capsys.readouterr().out
    assert (tmp_path / "c" / "compare.json").exists()


# --- a full disk, a folder that cannot be written


class FullFile(HalfFile):
    @staticmethod
    def end() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as the system says it: without a file name


def fill_the_disk(patch: pytest.MonkeyPatch, name: str, where: str) -> None:
    """No space at the next write of `name`: when it is opened, written, made safe or given its name."""
    error, opened = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), []
    real_fsync, real_replace, real_open = os.fsync, os.replace, open
    opener = half_open(name, 1, FullFile) if where == "write" else real_open

    def spy(file: object, *rest: object, **named: object) -> object:
        opened.append(Path(file).name if isinstance(file, str | os.PathLike) else "")
        if where == "open" and opened[-1].startswith(name) and "w" in rest[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return opener(file, *rest, **named)

    def fsync(number: int) -> None:
        if where == "fsync" and opened[-1].startswith(name):
            raise error
        real_fsync(number)

    def rename(source: Path, target: Path) -> None:
        if where == "replace" and Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))
        real_replace(source, target)

    for owner, attribute, fake in ((builtins, "open", spy), (io, "open", spy), (os, "fsync", fsync)):
        patch.setattr(owner, attribute, fake)
    patch.setattr(os, "replace", rename)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("last.pt", "write"), ("last.pt", "fsync"), ("last.pt", "open"), ("last.pt", "replace"),
        ("previous.pt", "replace"), ("stage2.pt", "write"), ("config.json", "write"), ("tokenizer.model", "fsync"),
        ("predictions.jsonl", "write"), ("metrics.json", "fsync"), ("metrics.json", "write"),
    ],
)  # fmt: skip
def test_a_full_disk_ends_in_one_line_and_costs_nothing(
    name: str, where: str, stopped: Path, finished: Path, capsys
) -> None:
    """Catches a traceback, half a file under a real name, one that is left over, and a checkpoint that was lost."""
    before = contents(stopped)
    with pytest.MonkeyPatch.context() as patch:
        fill_the_disk(patch, name, where)
        status = run(stopped)
    named = "last.pt" if name == "previous.pt" else name
    assert refused(status, capsys.readouterr().err, named, os.strerror(errno.ENOSPC))
    assert not list(stopped.glob("*.tmp")) and r2d.last_state(stopped)["stage"] == 2
    assert all((stopped / key).read_bytes() == before[key] for key in ("stage1.pt", "tokenizer.model"))
    assert run(stopped) == 0
    check_same(stopped, finished)


@pytest.mark.parametrize("name", ["tokenizer.model", "config.json", "stage1.pt", "last.pt"])
def test_a_disk_that_is_full_from_the_start(name: str, finished: Path, tmp_path: Path, capsys) -> None:
    """Catches a first save that fails and leaves a run that cannot be given again."""
    with pytest.MonkeyPatch.context() as patch:
        fill_the_disk(patch, name, "write")
        status = run(tmp_path / "run")
    assert refused(status, capsys.readouterr().err, name) and not list((tmp_path / "run").glob("*.tmp"))
    assert run(tmp_path / "run") == 0
    check_same(tmp_path / "run", finished)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_log_that_cannot_be_written_is_no_traceback(stopped: Path, capsys) -> None:
    """Catches an error of the log, which is written by another road than the checkpoints, that nobody handles."""
    before = contents(stopped)
    (stopped / "log.jsonl").unlink()
    (stopped / "log.jsonl").symlink_to("/dev/full")
    assert refused(run(stopped), capsys.readouterr().err, str(stopped))
    assert all((stopped / name).read_bytes() == before[name] for name in ("last.pt", "previous.pt"))


def test_no_space_for_the_log_is_no_traceback(stopped: Path, finished: Path, capsys) -> None:
    """Catches a full disk that only the log meets, at a flush, after the checkpoint of the step was made."""

    class FullLog(io.FileIO):
        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opener(file: object, mode: str = "r", **named: object) -> object:
        return io.BufferedRandom(FullLog(file, "a+")) if Path(file).name == "log.jsonl" else open(file, mode, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r2d, "open", opener, raising=False)
        status = run(stopped)
    assert refused(status, capsys.readouterr().err, str(stopped), os.strerror(errno.ENOSPC))
    assert run(stopped) == 0
    check_same(stopped, finished)


@pytest.mark.parametrize("name", ["lock", "config.json", "log.jsonl", "last.pt", "metrics.json"])
def test_a_file_that_may_not_be_written_is_one_line(name: str, stopped: Path, finished: Path, capsys) -> None:
    """Catches a traceback from a folder of somebody else; the error is made, as the tests may run as root."""

    def opener(file: object, mode: str = "r", **named: object) -> object:
        if Path(file).name.startswith(name) and mode != "r":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return open(file, mode, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r2d, "open", opener, raising=False)
        status = run(stopped)
    assert refused(status, capsys.readouterr().err, name, os.strerror(errno.EACCES))
    assert run(stopped) == 0
    check_same(stopped, finished)


def test_an_out_that_is_a_file_or_may_not_be_made_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    """Catches a traceback from --out that names a file, a folder below a file, or one that cannot be made."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert refused(run(out), capsys.readouterr().err, str(out))
        assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"

    def mkdir(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert refused(run(tmp_path / "run"), capsys.readouterr().err, str(tmp_path / "run"))


@posix
@pytest.mark.parametrize("where", ["validate", "answers", "rationale_report"])
def test_a_folder_that_vanishes_during_the_run_is_one_line(where: str, stopped: Path, monkeypatch, capsys) -> None:
    """Catches a traceback when somebody deletes the folder of a run at work."""
    real = getattr(r2d, where)

    def vanish(*arguments: object) -> object:
        shutil.rmtree(stopped, ignore_errors=True)
        return real(*arguments)

    monkeypatch.setattr(r2d, where, vanish)
    assert refused(run(stopped), capsys.readouterr().err, str(stopped))


# --- a loss that is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_after_a_loss_that_is_not_finite_the_run_goes_on_from_the_last_save(
    value: float, stopped: Path, finished: Path, monkeypatch, capsys
) -> None:
    """Catches a save of broken weights, a message without the place, and a run that cannot be mended."""
    before, real = contents(stopped), r2d.token_mean
    at_step(monkeypatch, 11, lambda: monkeypatch.setattr(r2d, "token_mean", lambda *a: real(*a) * value))
    assert refused(run(stopped), capsys.readouterr().err, "stage 2", "step 11", "--lr")
    after = contents(stopped)
    assert all(after[name] == before[name] for name in before if name.endswith(".pt"))
    monkeypatch.undo()
    assert run(stopped) == 0
    check_same(stopped, finished)


# --- two runs in one folder


@pytest.mark.parametrize("option", [[], ["--fresh"], ["--eval"], ["--stage", "1"]])
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(option: list, stopped: Path, capsys) -> None:
    """Catches two runs that write the same files, and --fresh that moves the folder of a run at work."""
    before = contents(stopped)
    with r2d.alone(stopped, fresh=False):
        assert refused(run(stopped, *option), capsys.readouterr().err, str(stopped), "another run")
        assert contents(stopped) == before and sorted(path.name for path in stopped.parent.iterdir()) == ["run"]
    with r2d.alone(stopped, fresh=False):  # free again
        pass


@posix
def test_a_run_at_work_keeps_others_out_until_it_dies(
    nursery: Nursery, stopped: Path, finished: Path, tmp_path: Path, capsys
) -> None:
    """Catches a lock that holds in one process only, or that a killed run leaves behind; --ask needs none."""
    marker = tmp_path / "marker"
    pid = nursery.start(stopped, fate=("hold", "r2d.stage2_loss", 1, str(marker)))
    wait_for(marker)
    before = contents(stopped)
    for option in ([], ["--fresh"], ["--eval"]):
        assert refused(run(stopped, *option), capsys.readouterr().err, str(stopped), "another run")
    assert run(stopped, "--ask", "a cough") == 0 and "label" in capsys.readouterr().out
    assert contents(stopped) == before and not stopped.with_name("run.old1").exists()
    os.kill(pid, signal.SIGKILL)
    assert nursery.wait(pid)[0] == -signal.SIGKILL
    assert run(stopped) == 0
    check_same(stopped, finished)


# --- damaged and strange files


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def weights_of(content: dict) -> str:
    return "model" if "model" in content else "weights"


def changed(change: Callable[[dict], dict]) -> Callable:
    return lambda content: content | {weights_of(content): change(content[weights_of(content)])}


def of_another_width(content: dict) -> dict:
    config = r2d.ModelConfig(400, 48, 2, 24, 192, 1, 1, 0.0)
    model = r2d.Transformer(config)
    optimizer = r2d.Adam(model).state()
    new = {"config": asdict(config), "weights": model.state_dict(), "model": model.state_dict(), "optimizer": optimizer}
    return content | {key: value for key, value in new.items() if key in content}


def optimizer_of_another_shape(content: dict) -> dict:
    means = [mean[..., :1] for mean in content["optimizer"]["means"]]
    return content | {"optimizer": content["optimizer"] | {"means": means}}


RAW = {
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "cut to 20 kB": lambda raw: raw[:20_000],  # torch says OSError where it seeks before the beginning of a file
    "without its end": lambda raw: raw[:-1],
    "text": lambda raw: b"this is not a checkpoint\n",
    "random": lambda raw: random.Random(0).randbytes(5000),
    "pickle": lambda raw: pickle.dumps([1, 2, 3]),
}
TYPED = {
    "list": lambda content: [1, 2, 3],
    "tensor": lambda content: torch.zeros(3),
    "int": lambda content: 3,
    "other keys": lambda content: {"a": 1},
    "all text": lambda content: dict.fromkeys(content, "x"),
    "all none": lambda content: dict.fromkeys(content),
    "all tensors": lambda content: dict.fromkeys(content, torch.zeros(3)),
    "shapes": changed(lambda weights: {key: value[..., :1] for key, value in weights.items()}),
    "missing weights": changed(lambda weights: dict(list(weights.items())[1:])),
    "extra weights": changed(lambda weights: weights | {"extra": torch.zeros(2)}),
    "no weights": changed(lambda weights: {}),
    "another width": of_another_width,
}
OF_STATES = {
    "optimizer": optimizer_of_another_shape,
    "no optimizer": lambda content: content | {"optimizer": {}},
    "rng": lambda content: content | {"rng": content["rng"][:10]},
    "coin": lambda content: content | {"coin": content["rng"].float()},
    "step": lambda content: content | {"step": "many"},
    "log_size": lambda content: content | {"log_size": [3]},
}


def damage(path: Path, kind: str) -> None:
    if kind in RAW:
        path.write_bytes(RAW[kind](path.read_bytes()))
    elif kind == "evil":
        torch.save({"stage": Evil(path.with_name("evil")), "config": Evil(path.with_name("evil"))}, path)
    elif kind == "evil pickle":
        path.write_bytes(pickle.dumps(Evil(path.with_name("evil"))))
    else:
        torch.save((TYPED | OF_STATES)[kind](load(path)), path)


KINDS = [*RAW, *TYPED, "evil", "evil pickle"]
STATES = [*KINDS, *OF_STATES]
UNREADABLE = [*RAW, "list", "tensor", "int", "other keys", "evil", "evil pickle"]  # seen when the file is read


def train_only(patch: pytest.MonkeyPatch) -> None:
    """The evaluation is not what the damage is about."""
    patch.setattr(r2d, "evaluate", lambda one: {})
    patch.setattr(r2d, "print_result", lambda one, result: None)


@pytest.mark.parametrize("kind", STATES)
def test_a_damaged_last_pt_is_named_or_the_one_before_is_used(
    kind: str, stopped: Path, finished: Path, monkeypatch, capsys
) -> None:
    """Catches a traceback, code that runs from a pickle, a silent restart, and a previous.pt that nobody reads."""
    train_only(monkeypatch)
    damage(stopped / "last.pt", kind)
    status = run(stopped)
    said = capsys.readouterr()
    assert not (stopped / "evil").exists()
    if kind in UNREADABLE:
        assert status == 0 and "goes on at step 9" in said.out
        assert {line.split(": ")[0] for line in messages(said.err)} == {"note"} and "last.pt" in said.err
    if status:
        assert refused(status, said.err, "last.pt")
        (stopped / "last.pt").unlink()  # what the message says
        assert run(stopped) == 0
    assert same_training(stopped, finished) and log_of(stopped) == log_of(finished)


@pytest.mark.parametrize("kind", STATES)
def test_a_damaged_previous_pt_that_is_needed_is_named(kind: str, stopped: Path, monkeypatch, capsys) -> None:
    """Catches a traceback, and a message that names last.pt, which is not there."""
    train_only(monkeypatch)
    damage(stopped / "previous.pt", kind)
    (stopped / "last.pt").unlink()
    assert refused(run(stopped), capsys.readouterr().err, "previous.pt") and not (stopped / "evil").exists()


def test_a_damaged_previous_pt_that_is_not_needed_does_not_matter(stopped: Path, finished: Path) -> None:
    """Catches a resume that fails for a file that it could do without."""
    damage(stopped / "previous.pt", "truncated")
    assert run(stopped) == 0
    check_same(stopped, finished)


@pytest.mark.parametrize("name", ["stage1.pt", "stage2.pt"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_best_weights_are_named(kind: str, name: str, stopped: Path, finished: Path, capsys) -> None:
    """Catches a traceback in training, --eval or --ask, code that runs from a pickle, and weights that half fit."""
    damage(stopped / name, kind)
    for arguments in (["--eval"], ["--ask", "a cough"], []):
        if arguments == ["--eval"] and name == "stage1.pt" and kind not in ("truncated", "shapes"):
            continue  # --eval reads it late, for BERTScore
        status, said = run(stopped, *arguments), capsys.readouterr()
        if name == "stage1.pt" and arguments[:1] == ["--ask"]:
            assert status == 0  # the answer comes from stage 2
        elif name == "stage2.pt" and not arguments and status == 0:
            check_same(stopped, finished)  # a better one came and took its place
        else:
            assert refused(status, said.err, name), (arguments, status, said.err)
    assert not (stopped / "evil").exists()


def test_a_stage1_pt_that_was_deleted_is_made_again(stopped: Path, finished: Path) -> None:
    """Catches advice ("delete it") that leads nowhere, and a log that then tells of stage 1 twice."""
    (stopped / "stage1.pt").unlink()
    assert run(stopped) == 0
    check_same(stopped, finished)


CONFIGS = {
    "empty": lambda c: "",
    "not JSON": lambda c: "{'a': 1}",
    "truncated": lambda c: json.dumps(c)[:200],
    "list": lambda c: "[]",
    "number": lambda c: "3",
    "null": lambda c: "null",
    "missing option": lambda c: json.dumps({k: v for k, v in c.items() if k != "lr"}),
    "no labels": lambda c: json.dumps({k: v for k, v in c.items() if k != "labels"}),
    "labels text": lambda c: json.dumps(c | {"labels": "abc"}),
    "labels numbers": lambda c: json.dumps(c | {"labels": [1, 2]}),
    "no model": lambda c: json.dumps({k: v for k, v in c.items() if k != "model"}),
    "model list": lambda c: json.dumps(c | {"model": [1]}),
    "unknown model key": lambda c: json.dumps(c | {"model": c["model"] | {"wings": 2}}),
    "another data": lambda c: json.dumps(c | {"data_sha256": 0}),
    "steps text": lambda c: json.dumps(c | {"stage2_steps": "many"}),
    "lr list": lambda c: json.dumps(c | {"lr": [1]}),
    "seed null": lambda c: json.dumps(c | {"seed": None}),
    "data number": lambda c: json.dumps(c | {"data": 3}),
    "method unknown": lambda c: json.dumps(c | {"method": "guess"}),
    "batch_size half": lambda c: json.dumps(c | {"batch_size": 7.5}),
    "nested": lambda c: "[" * 100_000,
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_damaged_config_json_is_named(kind: str, done: Path, capsys) -> None:
    """Catches a traceback from a file that was edited or cut, whatever is asked of the run."""
    path = done / "config.json"
    path.write_text(CONFIGS[kind](json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    if kind == "another data":
        assert refused(r2d.main(["--out", str(done), "--eval"]), capsys.readouterr().err, "changed since the run")
        return
    (done / "metrics.json").unlink()  # not finished
    for arguments in ([], ["--eval"], ["--ask", "a cough"]):
        status = r2d.main(["--out", str(done), *arguments])
        assert refused(status, capsys.readouterr().err, "config.json"), arguments


def test_a_config_json_of_another_model_shape_does_not_fit_the_weights(done: Path, capsys) -> None:
    """Catches weights that are loaded into another shape than they were trained in."""
    path = done / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(saved | {"width": 64}), encoding="utf-8")
    assert refused(r2d.main(["--out", str(done), "--eval"]), capsys.readouterr().err, "stage2.pt")
    assert refused(r2d.main(["--out", str(done), "--ask", "a cough"]), capsys.readouterr().err, "stage2.pt")
    assert refused(run(done, "--eval"), capsys.readouterr().err, "--width")


@pytest.mark.parametrize("content", [b"", b"this is no tokenizer", bytes(range(256))])
def test_a_damaged_tokenizer_is_named(content: bytes, stopped: Path, capsys) -> None:
    """Catches a traceback from SentencePiece, and a run that goes on with another tokenizer."""
    before = (stopped / "last.pt").read_bytes()
    (stopped / "tokenizer.model").write_bytes(content)
    for arguments in ([], ["--eval"], ["--ask", "a cough"]):
        assert refused(run(stopped, *arguments), capsys.readouterr().err, "tokenizer.model"), arguments
    assert (stopped / "last.pt").read_bytes() == before


@pytest.mark.parametrize("kind", ["missing", "cut", "cut in a line", "longer", "garbage"])
def test_a_damaged_log_does_not_stop_the_run(kind: str, stopped: Path, finished: Path) -> None:
    """Catches zeros in front of the new lines, lines that are logged twice, and a log that weighs more than weights."""
    path = stopped / "log.jsonl"
    raw = path.read_bytes()
    cut = b"".join(raw.splitlines(True)[:5])
    damaged = {"cut": cut, "cut in a line": cut[:-20], "longer": raw + raw, "garbage": b"\xff" * len(raw)}
    path.unlink() if kind == "missing" else path.write_bytes(damaged[kind])
    assert run(stopped) == 0 and same_training(stopped, finished)
    assert (stopped / "predictions.jsonl").read_bytes() == (finished / "predictions.jsonl").read_bytes()
    assert b"\0" not in path.read_bytes()
    if kind in ("missing", "cut", "longer"):
        expected = log_of(finished)
        kept = {"missing": [], "cut": expected[:5], "longer": expected[:17]}[kind]
        assert log_of(stopped) == kept + expected[17:]


def test_an_evaluation_of_an_unfinished_run_does_not_finish_it(stopped: Path, finished: Path) -> None:
    """Catches a run whose training never goes on because --eval left a metrics.json there."""
    assert run(stopped, "--eval") == 0
    assert run(stopped) == 0
    check_same(stopped, finished)


@pytest.mark.parametrize("name", ["predictions.jsonl", "metrics.json"])
def test_damaged_results_are_made_again_by_eval(name: str, done: Path, finished: Path) -> None:
    """Catches an evaluation that reads what it is about to write."""
    (done / name).write_bytes((done / name).read_bytes()[:100])
    assert run(done, "--eval") == 0
    check_same(done, finished)


def test_a_damaged_metrics_json_in_a_comparison_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    """Catches a traceback from one bad file after hours of runs."""
    command = [*TINY, "--compare", "sft", "--seeds", "0", "--out", str(tmp_path / "c")]
    monkeypatch.setattr(r2d, "job", lambda o: None)
    (tmp_path / "c" / "sft-0").mkdir(parents=True)
    (tmp_path / "c" / "sft-0" / "metrics.json").write_text("", encoding="utf-8")
    assert refused(r2d.main(command), capsys.readouterr().err, "metrics.json")


# --- the data of an unfinished run


def test_data_that_changed_since_the_run_began_is_refused(tmp_path: Path, capsys) -> None:
    """Catches a run that goes on with other examples, and one that refuses a file that was only touched."""
    path, out = tmp_path / "d.jsonl", tmp_path / "run"
    rows = [note(random.Random(i)) for i in range(40)]  # --limit cuts none off
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run(out, "--data", str(path), "--stage", "1") == 0
    before = contents(out)
    path.write_text("\n".join(map(json.dumps, [*rows[:-1], rows[-1] | {"rationale": "so"}])), encoding="utf-8")
    capsys.readouterr()
    for arguments in (["--data", str(path)], [], ["--stage", "1"]):
        assert refused(r2d.main(["--out", str(out), *arguments]), capsys.readouterr().err, "d.jsonl", "changed")
    path.unlink()
    assert refused(r2d.main(["--out", str(out)]), capsys.readouterr().err, "d.jsonl")
    assert contents(out) == before
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    os.utime(path, (1, 1))
    assert r2d.main(["--out", str(out)]) == 0


# --- the source


SOURCES = sorted(ROOT.glob("*.py"))
FREE_IMPORTS = {"torch", "numpy", "sentencepiece", "tqdm", "data", "metrics", "model", "r2d"}


@pytest.mark.parametrize("path", [*SOURCES, *sorted(ROOT.glob("tests/*.py"))], ids=lambda path: path.name)
def test_the_source_is_python_3_10(path: Path) -> None:
    """Catches syntax that Python 3.10 does not know."""
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_text_file_is_opened_with_an_encoding(path: Path) -> None:
    """Catches a file that is read in the code page of a Windows machine."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name not in ("open", "read_text", "write_text", "fdopen") or owner in ("self.opener", "os"):
            continue
        if owner == "" and name in ("read_text", "write_text"):
            continue  # a function of ours
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        binary = name == "open" and any("b" in mode for mode in modes[-1:])
        assert binary or any(k.arg == "encoding" for k in node.keywords), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_are_the_standard_library_and_the_requirements(path: Path) -> None:
    """Catches a module that a fresh installation, or Windows, does not have."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in (name.split(".")[0] for name in names):
            local = name in ("safetensors", "fcntl", "msvcrt") and id(node) in inner
            usual = name in sys.stdlib_module_names - {"fcntl", "msvcrt"} or name in FREE_IMPORTS
            assert local or usual, f"{path.name}:{node.lineno}: {name}"


if __name__ == "__main__":
    forks()
