"""Kills, Ctrl-C, full disks, two processes on a poor screen. Each test names its bug."""

import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import FILES, ROOT, contents, lines, same, write_notes

import metrics
import r2d

# Validations and saves after updates 3 and 6 of stage 1 and 3, 6, 9 and 12 of stage 2.
TINY = "--limit 32 --stage1-steps 6 --stage2-steps 12 --eval-every 3 --batch-size 8 --width 32"
TINY += " --heads 2 --layers 1 --lr 0.1 --vocab-size 400 --max-target 16 --dropout 0.1"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and fork")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A tiny run on notes so easy that a few updates change every score."""
    notes = write_notes(tmp_path_factory.mktemp("notes") / "notes.csv")
    notes.write_text(notes.read_text("utf-8").replace("is", "\N{BONE}"), "utf-8")
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


def check_same(out: Path, other: Path) -> None:
    """The files of two runs are the same, to the byte; of a .pt file, all that it holds."""
    assert sorted(contents(out)) == FILES
    for name in FILES:
        read = partial(torch.load, weights_only=True) if name.endswith(".pt") else Path.read_bytes
        assert same(read(out / name), read(other / name)), name


# In the order in which a run comes by: each is reached from where the one before left the run.
MOMENTS = [("Path.write_bytes", "config.json", 1), ("r2d.stage1_loss", "", 2)]
MOMENTS += [("Path.write_bytes", "last.pt", 1), ("Path.replace", "last.pt", 1)]
MOMENTS += [("Path.write_bytes", "log.jsonl", 1), ("r2d.stage1_loss", "", 2)]
MOMENTS += [("Path.write_bytes", "stage1.pt", 1), ("Path.replace", "stage1.pt", 1)]
MOMENTS += [("r2d.train", "", 2), ("metrics.macro_f1", "", 1), ("r2d.mix_labels", "", 5)]
MOMENTS += [("Path.replace", "log.jsonl", 3), ("Path.write_bytes", "stage2.pt", 1)]
MOMENTS += [("metrics.score", "", 1), ("Path.write_bytes", "predictions.jsonl", 1)]
MOMENTS += [("Path.replace", "metrics.json", 1)]


def die_again_and_again(arguments: list[str]) -> None:
    """Fork a process for each moment, which runs r2d.main and dies then. Print how each ended."""
    torch.optim.Adam([torch.zeros(1)])  # imports what takes long, once for all
    for place, only, number in MOMENTS:
        child = os.fork()
        if child == 0:
            at_call(place, only, number, None, pytest.MonkeyPatch())
            os._exit(r2d.main(arguments))
        print("ended", os.waitpid(child, 0)[1])


def test_kills_leave_no_trace(options, undisturbed, tmp_path):
    """Catches a resume that loses or repeats anything: weights, optimiser, dropout, coins, place,
    best score, log; and a file that is half there under its name."""
    said = launch([__file__, *options, "--out", str(tmp_path)]).communicate(timeout=300)[0]
    assert said.count("ended 9\n") == said.count("ended") == len(MOMENTS), said
    assert r2d.main(["--out", str(tmp_path)]) == 0  # with the options of the run
    check_same(tmp_path, undisturbed)


def test_ctrl_c_then_stage_1_then_stage_2(options, undisturbed, tmp_path, monkeypatch, capsys):
    """Catches a Ctrl-C without advice, a stage 2 that repeats stage 1, reads other weights or
    loses its log, and a finished run that is not left alone."""
    out = tmp_path / "run"
    at_call("r2d.stage1_loss", "", 5, KeyboardInterrupt(), monkeypatch)
    assert r2d.main([*options, "--out", str(out)]) == 130
    assert "the same command" in capsys.readouterr().err.splitlines()[-1]
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


@pytest.mark.parametrize("name", [name for name in FILES if name != "stage1.pt"])
def test_a_full_disk_costs_nothing(name, halted, undisturbed, tmp_path, monkeypatch, capsys):
    """Catches a traceback, half a file under its name, and a checkpoint that is lost."""
    for place in ("Path.write_bytes", "Path.replace"):
        out = shutil.copytree(halted, tmp_path / place)
        before = contents(out)
        at_call(place, name, 1, OSError(errno.ENOSPC, "disk full"), monkeypatch)
        assert r2d.main(["--out", str(out)]) == 2
        assert re.fullmatch("r2d.py: .*disk full.*\n", capsys.readouterr().err)
        after = contents(out)
        assert (after["stage1.pt"], after.get(name)) == (before["stage1.pt"], before.get(name))
        assert r2d.main(["--out", str(out)]) == 0
        check_same(out, undisturbed)


def test_a_loss_that_is_not_finite_stops_the_run(halted, monkeypatch, capsys):
    """Catches training on through nan, and a save full of it."""
    before = contents(halted)
    nll = r2d.Transformer.nll
    monkeypatch.setattr(r2d.Transformer, "nll", lambda *arguments: nll(*arguments) * float("nan"))
    assert r2d.main(["--out", str(halted)]) == 2
    assert re.fullmatch("r2d.py: .*update 9.*--lr.*\n", capsys.readouterr().err)
    assert contents(halted) == before


def launch(command: list[str]) -> subprocess.Popen:
    """A process with a screen that lacks letters."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], env=env, errors="replace", **pipes)


def test_two_processes_are_one_run(options, tmp_path, capsys, monkeypatch):
    """Catches rows seen twice, gradients of the wrong size, other coins on each rank, a process
    that waits for ever (20 updates and the predictions of one process), more of them than rows; a
    finished run that ends with an error because its examples have letters that the screen lacks."""
    outs = [tmp_path / "one", tmp_path / "two"]
    exact = "--dropout 0 --optimizer adamw --lr 0.01".split()  # Muon rounds to bfloat16
    command = [*options, "--stage1-steps", "8", *exact, "--out"]
    assert r2d.main([*command, str(outs[0])]) == 0
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    process = launch([*torchrun, str(ROOT / "r2d.py"), *command, str(outs[1])])
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and " ? " in said, said
    logs = [lines(out / "log.jsonl") for out in outs]
    for one, two in zip(*logs, strict=True):
        for key in two | one:
            assert two[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), key
            assert type(two[key]) is type(one[key]), key
    assert sum(line.get("wrong_predicted", 0) for line in logs[0]) > 0
    for one, two in zip(*[lines(out / "predictions.jsonl") for out in outs], strict=True):
        assert two == pytest.approx(one, abs=1e-3)  # of texts: equal
    monkeypatch.setattr(r2d, "WORLD", 2)
    with pytest.raises(SystemExit):
        r2d.parse_args([*options, "--batch-size", "1"])
    assert "2 processes need" in capsys.readouterr().err


if __name__ == "__main__":
    die_again_and_again(sys.argv[1:])
