"""README and results.md: every command at a tiny size, every number; the benchmark, the race."""

import json
import re
import shlex
import shutil
from types import SimpleNamespace

import bench
import compare
import nbformat
import pytest
import race
from execute import printed
from helpers import ROOT, TINY, write_folder, write_notes, write_t5

import r2d

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "notebooks" / "results.md").read_text(encoding="utf-8")
COMMANDS = {command.strip() for command in re.findall(r"python r2d\.py ([^`#\n]*)", README)}
COMMANDS = sorted(COMMANDS - {"-h"})


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory):
    """What the commands name: data of one's own, a T5 checkpoint, a finished run."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("notes", "pubmedqa"):
        (folder / name).mkdir()
        write_folder(folder / name)
    for name in ("notes.csv", "rationales.csv"):
        write_notes(folder / name)
    shutil.copytree(finished, folder / "out")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_run(command, files, tmp_path, monkeypatch):
    """Catches a README that shows an option or a value that no longer exists."""
    monkeypatch.chdir(shutil.copytree(files, tmp_path / "here"))
    arguments = shlex.split(command)
    if "--ask" in arguments:  # the run that the command before it trains
        shutil.copytree("out", "out-gold")
    if "--init" in arguments:
        folder = arguments[arguments.index("--init") + 1]
        write_t5(tmp_path / "here" / folder, (files / "out" / "tokenizer.model").read_bytes())
    assert r2d.main([*TINY, *arguments]) == 0


COMPARISONS = re.findall(r"python notebooks/compare\.py ([^#\n]*)", RESULTS.replace("\\\n", " "))
COMPARISONS = [" ".join(command.split()) for command in COMPARISONS]


@pytest.mark.parametrize("command", COMPARISONS)
def test_commands_of_results_run(command, tmp_path):
    """Catches an item or an option that left. The longest command runs, with one seed."""
    items, further = re.fullmatch(r"(.*) --seeds \{[\d.]+\}(.*) --out .*", command).groups()
    if command == max(COMPARISONS, key=len):
        assert compare.main([*items.split(), "--seeds", "0", "--out", str(tmp_path), *TINY]) == 0
    for item in items.split():
        compare.plan(item, 1, tmp_path, further.split())


METHODS = README.split("## The paper's methods compared")[1].split("A run ends")[0]


@pytest.mark.parametrize("text, least", [(METHODS, 5), (RESULTS, 20)])
def test_numbers_are_printed_by_notebook_3(text, least):
    """Catches a number of README or results.md that was typed by hand, or one of older runs."""
    known = printed(nbformat.read(ROOT / "notebooks" / "03_compare.ipynb", 4))
    rows = re.findall(r"^\| [^|]+ \| (.*±.*) \|$", text, re.M)
    assert len(rows) >= least and [row for row in rows if row not in known] == []
    prose = re.sub("```.*?```|`[^`]*`", "", text, flags=re.S)
    numbers = set(re.findall(r"\d+\.\d+", prose)) - {"0.2", "2512.20074"}
    assert numbers <= set(re.findall(r"\d+\.\d+", known))


def test_the_benchmark_runs(tmp_path, capsys):
    """Catches a benchmark that no longer fits the core, and a peer with other weights."""
    pytest.importorskip("transformers")
    options = [*TINY, "--out", str(tmp_path), "--warmup", "0", "--cap", "0", "--alpha", "1"]
    run = r2d.setup(r2d.parse_args(options))
    example = run.dataset.train[0]
    loss = bench.Peer(run, 0.0).loss([f"predict: {example.question}"], [example.label])
    assert loss.item() == pytest.approx(r2d.stage2_loss(run, [example], 0)[0].item())
    few = ["--size", "tiny", "--tries", "1", "--steps", "1", "--notes", "2", "--one-process"]
    bench.main([*few, "--out", str(tmp_path / "run")])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(rows) == 7 and all(row["ratio"] > 0 for row in rows.values())


def test_the_race_runs(tmp_path, capsys, monkeypatch):
    """Catches a race that no longer fits the core, one that counts the seconds of measurements, a
    mark without a measurement."""
    pytest.importorskip("transformers")
    clock = [0]  # a second passes at each look at it, and a hundred in each BLEU

    def pass_by(seconds: int) -> int:
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr(race, "BEGAN", 0)
    monkeypatch.setattr(race, "time", SimpleNamespace(perf_counter=lambda: pass_by(1)))
    monkeypatch.setattr(race.metrics, "corpus_bleu", lambda *texts: float(pass_by(100) > 0))
    for name in ("stage1_loss", "stage2_loss", "evaluate"):  # which the race replaces
        monkeypatch.setattr(r2d, name, getattr(r2d, name))
    race.race_ours([*TINY, "--out", str(tmp_path / "run")], every=1)
    ours = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert [row["updates"] for row in ours] == [*range(13)]  # TINY: 4 + 8
    assert ours[-1]["seconds"] < 100
    clock[0] = 0
    race.race_peer([*TINY, "--out", str(tmp_path)], every=20, seconds=60, lr=1e-3)
    peer = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(peer) == 3 and 10 < peer[-1]["updates"] and 60 <= peer[-1]["seconds"] < 64
    for who, marks in (("ours", ours), ("peer", peer)):
        for row in marks:
            assert 0 <= row["macro_f1"] <= 100
            row |= {"who": who, "seed": 0}
    rows = ours + peer
    assert len(race.table(rows).splitlines()) == len(rows) + 1
    race.draw(rows, str(tmp_path / "race.png"))
    assert (tmp_path / "race.png").stat().st_size > 5000
