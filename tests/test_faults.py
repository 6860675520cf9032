"""Kills, Ctrl-C, full disks, two processes. Each test says which bug it catches."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, contents, lines, write_notes

import metrics
import r2d

# Validations and saves after updates 3 and 6 of stage 1 and 3, 6, 9 and 12 of stage 2.
TINY = "--limit 32 --stage1-steps 6 --stage2-steps 12 --eval-every 3 --batch-size 8 --width 32"
TINY += " --heads 2 --layers 1 --lr 0.1 --vocab-size 400 --max-target 16 --dropout 0.1"
FILES = ["config.json", "last.pt", "log.jsonl", "metrics.json", "predictions.jsonl"]
FILES += ["stage1.pt", "stage2.pt", "tokenizer.model"]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and fork")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A tiny run on notes so easy that a few updates change every score."""
    notes = write_notes(tmp_path_factory.mktemp("notes") / "notes.csv")
    return [*TINY.split(), "--device", "cpu", "--data", str(notes)]


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert r2d.main([*options, "--out", str(out)]) == 0
    assert lines(out / "log.jsonl")[-1]["used_predicted"] > 0  # else little can go wrong
    return out


@pytest.fixture(scope="module")
def halted(options, tmp_path_factory):
    """The same run, stopped before update 10 of stage 2; the last save is that after 9."""
    out = tmp_path_factory.mktemp("halted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_call("r2d.stage2_loss", "", 11, KeyboardInterrupt(), patch)
        assert r2d.main([*options, "--out", str(out)]) == 130
    return out


@pytest.fixture
def stopped(halted, tmp_path):
    """A copy of it to go on with."""
    return shutil.copytree(halted, tmp_path / "run")


def at_call(place: str, only: str, number: int, end: BaseException | None, patch) -> None:
    """Raise `end`, or die, before the call of this number with `only` in its arguments."""
    owner, name = place.split(".")
    owner = {"r2d": r2d, "metrics": metrics, "Path": Path}[owner]
    real = getattr(owner, name)
    calls = itertools.count(1)

    def wrapper(*arguments: object, **named: object) -> object:
        if only in str(arguments) and next(calls) == number:
            if name == "write_bytes":  # half of it is done
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if end:
                raise end
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    patch.setattr(owner, name, wrapper)


def die_after(events: int) -> None:
    """At a moment by chance: so many calls and returns from here."""
    left = itertools.count(events, -1)
    sys.setprofile(lambda *_: None if next(left) else os.kill(os.getpid(), signal.SIGKILL))


def check_same(out: Path, other: Path) -> None:
    """The files of two runs are the same, to the byte; of a checkpoint, its weights."""
    assert sorted(contents(out)) == FILES
    for name in FILES:
        if name.endswith(".pt"):
            one, two = [
                torch.load(run / name, weights_only=True)["weights"] for run in (out, other)
            ]
            assert one.keys() == two.keys()
            assert all(one[key].equal(two[key]) for key in one), name
        else:
            assert (out / name).read_bytes() == (other / name).read_bytes(), name


# ---- kills --------------------------------------------------------------------------------------
# In the order in which a run comes by: each is reached from where the one before left the run.
MOMENTS = [
    ("Path.write_bytes", "config.json", 1),
    ("r2d.stage1_loss", "", 2),
    ("Path.write_bytes", "last.pt", 1),
    ("Path.replace", "last.pt", 1),  # all is written, and has another name
    ("Path.write_bytes", "log.jsonl", 1),
    ("r2d.stage1_loss", "", 2),
    ("Path.write_bytes", "stage1.pt", 1),
    ("Path.replace", "stage1.pt", 1),
    ("r2d.train", "", 2),  # between the stages
    ("metrics.macro_f1", "", 1),  # the first validation of stage 2
    ("r2d.mix_labels", "", 5),
    ("Path.replace", "log.jsonl", 3),  # in the last save
    ("Path.write_bytes", "stage2.pt", 1),
    ("metrics.score", "", 1),
    ("Path.write_bytes", "predictions.jsonl", 1),
    ("Path.replace", "metrics.json", 1),
]


def die_again_and_again(moments: list, arguments: list[str]) -> None:
    """Fork a process for each moment, which runs r2d.main and dies then. Print how each ended."""
    torch.optim.Adam([torch.zeros(1)])  # imports what takes long, once for all
    for place, only, number in moments:
        child = os.fork()
        if child == 0:
            if place == "event":
                die_after(number)
            else:
                at_call(place, only, number, None, pytest.MonkeyPatch())
            os._exit(r2d.main(arguments))
        print("ended", os.waitpid(child, 0)[1])


def test_twenty_kills_leave_no_trace(options, undisturbed, tmp_path):
    """Catches a resume that loses or repeats anything: weights, optimiser, dropout, coins, place,
    best score, log; and a file that is half there under its name."""
    by_chance = [("event", "", number) for number in (98_765, 3_210, 54_321, 77_777)]
    for name, moments in [("chosen", MOMENTS), ("chance", by_chance)]:
        out = tmp_path / name
        process = launch([__file__, json.dumps(moments), *options, "--out", str(out)])
        said = process.communicate(timeout=300)[0]
        assert said.count("ended 9\n") == said.count("ended") == len(moments), said
        assert r2d.main(["--out", str(out)]) == 0  # with the options of the run
        check_same(out, undisturbed)


# ---- Ctrl-C, full disks -------------------------------------------------------------------------
PLACES = {"r2d.stage1_loss": 5, "r2d.stage2_loss": 8, "metrics.macro_f1": 2, "metrics.score": 1}


@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_says_how_to_go_on(place, options, undisturbed, tmp_path, monkeypatch, capsys):
    """Catches a traceback, another status than 130, and a run that cannot go on."""
    command = [*options, "--out", str(tmp_path / "run")]
    at_call(place, "", PLACES[place], KeyboardInterrupt(), monkeypatch)
    assert r2d.main(command) == 130
    assert "the same command" in capsys.readouterr().err.splitlines()[-1]
    assert r2d.main(command) == 0
    check_same(tmp_path / "run", undisturbed)


def test_early_stopping_counts_across_an_interruption(options, tmp_path, monkeypatch):
    """Catches a resume that forgets the best score or how often it was missed. The second Ctrl-C
    comes when the stage is over but for its checkpoint."""
    monkeypatch.setattr(r2d, "validate", lambda run, stage: {"val_loss": 1.0})
    command = [*options, "--out", str(tmp_path / "run"), "--stage", "1", "--eval-every", "1"]
    at_call("r2d.stage1_loss", "", 3, KeyboardInterrupt(), monkeypatch)
    assert r2d.main(command) == 130
    at_call("Path.replace", "stage1.pt", 1, KeyboardInterrupt(), monkeypatch)
    assert r2d.main(command) == 130
    assert r2d.main(command) == 0
    assert len(lines(tmp_path / "run" / "log.jsonl")) == 4  # the first is the best; patience 3


def test_stage_1_then_stage_2_is_the_whole_job(options, undisturbed, tmp_path, capsys):
    """Catches a stage 2 that repeats stage 1, reads other weights or loses its log, and a
    finished run that is not left alone."""
    out = tmp_path / "run"
    for stage in ("1", "2"):
        command = [*options, "--out", str(out), "--stage", stage]
        assert r2d.main(command) == 0
        assert ("stage2.pt" in contents(out)) == ("metrics.json" in contents(out)) == (stage == "2")
        before = contents(out)
        capsys.readouterr()
        assert r2d.main(command) == 0
        assert "finished" in capsys.readouterr().out
        assert contents(out) == before
    check_same(out, undisturbed)


@pytest.mark.parametrize("place", ["Path.write_bytes", "Path.replace"])
@pytest.mark.parametrize("name", [name for name in FILES if name != "stage1.pt"])
def test_a_full_disk_costs_nothing(name, place, stopped, undisturbed, monkeypatch, capsys):
    """Catches a traceback, half a file under its name, and a checkpoint that is lost."""
    before = contents(stopped)
    at_call(place, name, 1, OSError(errno.ENOSPC, "disk full"), monkeypatch)
    assert r2d.main(["--out", str(stopped)]) == 2
    assert re.fullmatch("r2d.py: .*disk full.*\n", capsys.readouterr().err)
    after = contents(stopped)
    assert (after["stage1.pt"], after.get(name)) == (before["stage1.pt"], before.get(name))
    assert r2d.main(["--out", str(stopped)]) == 0
    check_same(stopped, undisturbed)


def test_a_loss_that_is_not_finite_stops_the_run(stopped, undisturbed, monkeypatch, capsys):
    """Catches training on through nan, and a save full of it."""
    before = contents(stopped)
    nll = r2d.Transformer.nll
    monkeypatch.setattr(r2d.Transformer, "nll", lambda *arguments: nll(*arguments) * float("nan"))
    assert r2d.main(["--out", str(stopped)]) == 2
    assert re.fullmatch("r2d.py: .*update 9.*--lr.*\n", capsys.readouterr().err)
    assert contents(stopped) == before
    monkeypatch.undo()
    assert r2d.main(["--out", str(stopped)]) == 0
    check_same(stopped, undisturbed)


# ---- two processes ------------------------------------------------------------------------------
def launch(command: list[str], **more: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    env["PYTHONPATH"] = str(ROOT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], env=env, **pipes)


def test_two_processes_are_one_run(options, tmp_path):
    """Catches rows seen twice, gradients of the wrong size, other coins on each rank, a process
    that waits for ever: 20 updates and the predictions of one process."""
    outs = [tmp_path / "one", tmp_path / "two"]
    command = [*options, "--stage1-steps", "8", "--dropout", "0", "--out"]
    assert r2d.main([*command, str(outs[0])]) == 0
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    process = launch([*torchrun, str(ROOT / "r2d.py"), *command, str(outs[1])])
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    logs = [lines(out / "log.jsonl") for out in outs]
    assert len(logs[0]) == 20
    for one, two in zip(*logs, strict=True):
        assert two.keys() == one.keys()
        for key in two.keys() - {"grad_norm"}:
            assert two[key] == pytest.approx(one[key], abs=1e-5, rel=0), key
        for count in two.keys() & {"used_predicted", "wrong_predicted", "invalid_predicted"}:
            assert type(two[count]) is int
    assert sum(line.get("wrong_predicted", 0) for line in logs[0]) > 0
    rows = [lines(out / "predictions.jsonl") for out in outs]
    for one, two in zip(*rows, strict=True):
        assert two == pytest.approx(one, abs=1e-3)  # of texts: equal
    assert sorted(contents(outs[1])) == FILES


def test_a_lost_process_ends_the_run_and_one_process_goes_on(options, tmp_path):
    """Catches a run that hangs when a machine dies, a traceback, and a save nobody can use."""
    out = tmp_path / "run"
    command = [str(ROOT / "r2d.py"), *options, "--stage2-steps", "120", "--out", str(out)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [launch(command, RANK=rank, **world) for rank in "01"]
    deadline = time.monotonic() + 100
    while not (out / "stage1.pt").exists() or len(lines(out / "log.jsonl")) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].kill()
    said = [process.communicate(timeout=60)[0] for process in processes]
    if processes[0].returncode != -signal.SIGABRT:  # gloo itself aborts, once in a hundred times
        assert processes[0].returncode == 1
        assert said[0].count("r2d.py: lost a process") == 1
    assert "Traceback" not in said[0]
    assert r2d.main(["--out", str(out)]) == 0
    log = lines(out / "log.jsonl")
    assert [line["step"] for line in log] == [*range(6), *range(log[-1]["step"] + 1)]


if __name__ == "__main__":
    die_again_and_again(json.loads(sys.argv[1]), sys.argv[2:])
