"""The scripts in notebooks/: compare.py, why.py, bertscore.py, draw.py."""

import json
import re
import shutil
import subprocess
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

import bertscore
import compare
import draw
import numpy as np
import pytest
import torch
import why
from helpers import ROOT, jsonl, lines, read, refusal, status, write, write_t5
from scipy import stats

import data

pytestmark = pytest.mark.usefixtures("here")

STEPS = "--stage1-steps 2 --stage2-steps 4 --eval-every 2 --batch-size 8 --notes 20 --limit 20"
OPTIONS = [*STEPS.split(), *"--width 32 --layers 1 --vocab-size 400 --max-target 24".split()]
ITEMS = ["sft,stage2-steps=3,width=16", "dss", "r2d", "r2d,no-stage1,schedule=none,batch-size=24"]
FOLDERS = ["sft_stage2-steps_3_width_16-1", "dss-3", "r2d-3"]
FOLDERS += ["r2d_no-stage1_schedule_none_batch-size_24-3"]
WRONG = ["bert", "r2d,capp=1", "r2d,cap=2", "r2d,seed=1", "r2d,out=x", "r2d,ask=x", "r2d --seed 5"]
WRONG += ["r2d --method dss", "r2d --stage 1", "r2d --seeds x", "r2d --data data.nix"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "all"
    assert status(compare.main, *ITEMS, "--seeds", 3, 1, 3, "--out", out, *OPTIONS) == 0
    return out


@pytest.fixture
def copy(compared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(compared, tmp_path / "all")


# ---- compare.py
def test_runs_have_equal_budgets_and_the_options_of_their_items(compared: Path) -> None:
    """Catches a baseline with fewer updates, and an ablation that is r2d by another name."""
    found = []
    for item, folder in zip(ITEMS, FOLDERS, strict=True):
        c = read(compared / folder / "config.json")
        log = lines(compared / folder / "log.jsonl")
        assert read(compared / "compare.json")[item]["updates"]["values"] == [len(log)] * 2
        found.append([c["method"], c["schedule"], c["width"], c["seed"], len(log)])
        found[-1].append(log[-1]["prompts"])
    assert found[:2] == [["sft", "linear", 16, 1, 3, 8], ["dss", "linear", 32, 3, 6, 8]]
    assert found[2:] == [["r2d", "linear", 32, 3, 6, 8], ["r2d", "none", 32, 3, 6, 20]]


def test_statistics_and_dose_are_those_of_a_hand_calculation() -> None:
    """Catches a normal for Student's t, n for n - 1, a missing seed or stage 1 counted in."""
    found = compare.over_seeds(np.array([1.0, 2.0, np.nan, 3.0, 4.0]))
    assert found["mean"] == 2.5 and found["ci95"] == pytest.approx([0.4457, 4.5543], abs=1e-3)
    assert compare.over_seeds(np.array([2.0, 2.0])) == {"mean": 2, "ci95": None, "p": None}
    log = [{"stage": 1, "loss_explain": 1}, {"stage": 2, "loss_explain": 1, "wrong_predicted": 1}]
    log.append({"stage": 2, "loss_explain": 1, "used_predicted": 8, "wrong_predicted": 3})
    assert compare.dose(log, 8) == 25
    assert np.isnan(compare.dose([{"stage": 2, "wrong_predicted": 0}], 8))  # sft: no such prompts


def test_compare_json_holds_the_runs_own_numbers(compared: Path, copy: Path) -> None:
    """Catches scores of another place, item or seed, differences not paired by seed, a budget
    that was planned but not used, and a dose of more prompts than there were."""
    row = read(compared / "compare.json")["r2d"]
    assert not [name for name in compare.SCORES if None in row[name]["values"]]
    for name, bleu in (("dss-1", 50.5), ("dss-3", 53.5), ("r2d-1", 40.5), ("r2d-3", 41.0)):
        result = {"rationale": {"predicted": {"bleu": bleu}}, "label": {"accuracy": 0}}
        write(copy / name / "metrics.json", result)
    line = {"stage": 2, "loss_explain": 1, "wrong_predicted": 5, "prompts": 5}
    write(copy / "dss-3" / "log.jsonl", jsonl([line]))
    assert status(compare.main, "dss", "r2d", "--seeds", 3, 1, "--out", copy, *OPTIONS) == 0
    row = read(copy / "compare.json")["dss"]
    assert row["seeds"] == [1, 3] and row["bleu"]["values"] == [50.5, 53.5]
    paired = stats.ttest_rel([50.5, 53.5], [40.5, 41.0])
    difference = row["bleu"]["minus_r2d"]
    assert difference["mean"] == 11.25 and difference["p"] == pytest.approx(paired.pvalue)
    assert difference["ci95"] == pytest.approx(list(paired.confidence_interval()))
    assert row["updates"]["values"] == [6, 1] and row["dose"]["values"] == [0, 100]
    assert row["accuracy"]["values"] == [0, 0] and row["nll"]["values"] == [None, None]


def test_table_is_the_json_in_100_columns() -> None:
    """Catches a whole interval printed as half of one, and rows too long for a screen."""
    runs = {"sft": [], "r2d,data=" + "x" * 200: []}
    for item, values in zip(runs, ([10, 12, 14], [10, 14.4, 19.6]), strict=True):
        for value in values:
            runs[item].append(dict.fromkeys(compare.SCORES, value))
    text = compare.table(compare.summarize(runs, [0, 1, 2], "sft"), "sft").split("\n")
    assert max(map(len, text)) <= 100 and text[2].split() == ["sft", "12.0", "±5.0", "0.0"]
    assert text[3].split()[1:] == ["14.7", "±11.9", "2.7", "±7.0"]


def test_finished_runs_are_left_alone_and_others_go_on(compared: Path, copy: Path, capsys) -> None:
    """Catches work done twice, a stop after Ctrl-C, old runs compared with new ones unlike them."""
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*/*.[pj]*")}
    shutil.rmtree(copy / "dss-3")
    (copy / "r2d-1" / "metrics.json").unlink()  # trained, but not yet evaluated
    assert status(compare.main, *ITEMS, "--seeds", 1, 3, "--out", copy, *OPTIONS) == 0
    assert (copy / "compare.json").read_bytes() == (compared / "compare.json").read_bytes()
    redone = [path for path in before if path.stat().st_mtime_ns != before[path]]
    assert {path.parent.name for path in redone} == {"dss-3", "r2d-1"}
    assert copy / "r2d-1" / "stage2.pt" not in redone
    fewer = OPTIONS[2:]  # the old runs would bring their --stage1-steps, a new one would not
    assert "r2d-1" in refusal(capsys, compare.main, "r2d", "--out", copy, *fewer)
    assert not (copy / "r2d-0").exists()


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_end_before_the_first_run(wrong: str, capsys) -> None:
    """Catches a misspelt option that is noticed after an hour: what comes before it is right."""
    item, *options = wrong.split()
    message = refusal(capsys, compare.main, "sft", item, "--out", "out", *OPTIONS, *options)
    assert re.search("[a-z]{2,}", wrong)[0] in message


# ---- why.py
def test_other_labels_have_the_dose_and_the_origin_that_they_claim(tmp_path, monkeypatch) -> None:
    """Catches a dose that is not R2D's, a model that predicts notes it has learned from, and a
    replaced function that stays for the next run."""
    learned, predicted = [], []

    def train(run: why.r2d.Run, stage: int, examples: list, *more: object, **named: object) -> None:
        learned.append(set(data.columns(examples)[0]))
        plain_train(run, stage, examples, *more, **named)

    def unseen(predicted_labels: dict, *more: object) -> tuple:
        predicted.append(predicted_labels)
        return plain_unseen(predicted_labels, *more)

    plain_train, plain_unseen = why.r2d.train, why.mix_unseen
    monkeypatch.setattr(why.r2d, "train", train)
    monkeypatch.setattr(why, "mix_unseen", unseen)
    options = [*OPTIONS, *"--warmup 0 --ramp 0 --cap 1 --stage2-steps 40 --eval-every 40".split()]
    assert status(why.main, "--seeds", 4, "--out", tmp_path, *options) == 0
    doses = {}
    for item in ("r2d", "r2d_schedule_none", "folds", "random", "random-folds"):
        log = lines(tmp_path / f"{item}-4" / "log.jsonl")
        doses[item] = [line["wrong_predicted"] for line in log if line["stage"] == 2]
    assert doses["random"] == doses["r2d"] and doses["random-folds"] == doses["folds"]
    assert sum(doses["r2d_schedule_none"]) == 0 < sum(doses["folds"])
    first, second = learned[4:6]  # after two runs of two stages
    assert first.isdisjoint(second) and first | second == set(predicted[0]) == learned[0]


# ---- bertscore.py
def test_bertscore_equals_package() -> None:
    """Catches any difference from the peer: cosines of both signs, with and without idf; precision
    and recall swapped, a match that is not the nearest, a scale of 0-1."""
    assert bertscore.bertscore(np.zeros((0, 2)), np.ones((1, 2))) == (0, 0, 0)
    peer = pytest.importorskip("bert_score.utils").greedy_cos_idf
    rng = np.random.default_rng(0)
    for _ in range(400):
        d = rng.integers(1, 40)
        x = rng.normal(rng.choice([-1, 0, 1]), 1, (rng.integers(3, 25), d))
        y = rng.normal(0.5, 2, (rng.integers(3, 25), d))
        idf = [rng.exponential(size=len(side)) for side in (x, y)]
        ones = [np.ones(len(side)) for side in (x, y)]
        for weights in ([], idf):
            factors = weights or ones
            sides = [y, ones[1], factors[1], x, ones[0], factors[0]]
            sides = [torch.tensor(side[None]) for side in sides]
            expected = 100 * torch.stack(peer(*sides)).numpy()[:, 0]
            assert bertscore.bertscore(x, y, *weights) == pytest.approx(expected, abs=1e-5)


def test_bertscore_is_of_the_given_encoder(copy: Path) -> None:
    """Catches another encoder or tokenizer, the end token scored, and conditions mixed up."""
    t5 = write_t5(copy / "t5", (copy / "r2d-1" / "tokenizer.model").read_bytes())
    rows = lines(copy / "r2d-3" / "predictions.jsonl")[:3]
    for row, text in zip(rows, ["", "see\u2028doctor", "mild"], strict=True):
        row["rationale_given_gold"] = row["rationale"]
        row["rationale_given_predicted"] = text
    rows.append(rows[0] | {"rationale": ""})  # counts for no rationale score
    write(copy / "r2d-3" / "predictions.jsonl", jsonl(rows))
    assert status(bertscore.main, copy / "r2d-3", "--encoder", t5) == 0
    tokenizer = data.Tokenizer.load(t5 / "spiece.model").processor
    encoder = pytest.importorskip("transformers").T5EncoderModel.from_pretrained(t5).eval()

    def vectors(text: str) -> np.ndarray:
        ids = torch.tensor([[*tokenizer.encode(text), 1]])
        return encoder(ids).last_hidden_state[0, :-1].detach().numpy()

    pairs = [(row["rationale_given_predicted"], row["rationale"]) for row in rows[:3]]
    scores = [bertscore.bertscore(vectors(text), vectors(gold)) for text, gold in pairs]
    result = read(copy / "r2d-3" / "bertscore.json")
    found = [result["predicted"][name] for name in bertscore.NAMES]
    assert found == pytest.approx(np.mean(scores, axis=0), abs=1e-3)
    assert result["gold"]["f1"] == pytest.approx(100) and result["gold"]["n"] == 3


# ---- draw.py
def test_pictures_show_the_numbers(copy: Path) -> None:
    """Catches a line drawn from another score, and no picture of a run that explains less."""
    out = copy / "picture.png"
    pictures = {}
    for source in ("dss-1", "r2d-1", "compare.json"):
        assert status(draw.main, copy / source, out) == 0
        pictures[source] = out.read_bytes()
    shown = [  # what is drawn, and a number in a file that the picture must show
        ("compare.json", "compare.json", "r2d", "bleu_flipped", "mean"),
        ("compare.json", "compare.json", "dss", "bleu", "values", 0),
        ("r2d-1", "r2d-1/metrics.json", "rationale", "flipped", "bleu"),
        ("r2d-1", "r2d-1/metrics.json", "rationale", "ceiling", "bleu"),
    ]
    for source, name, *place, key in shown:
        content = read(copy / name)
        reduce(getitem, place, content)[key] = 99.0
        write(copy / name, content)
        assert status(draw.main, copy / source, out) == 0
        assert out.read_bytes() != pictures[source]
        pictures[source] = out.read_bytes()


def test_one_style_per_method(compared: Path) -> None:
    """Catches two methods of one colour or marker, an item of one's own that looks like another,
    and a run drawn as another method."""
    for column in zip(*draw.METHODS.values(), strict=True):
        assert len(set(column)) == len(draw.METHODS)
    assert all(marker in draw.SYMBOLS for _, _, marker in draw.METHODS.values())
    first, *_, last = draw.METHODS
    items = ["r2d,alpha=0.5", first, last, "r2d,alpha=0.6"]
    styles = draw.styles(items)
    names = [items[0], draw.METHODS[first][0], draw.METHODS[last][0], items[3]]
    assert [styles[item][0] for item in items] == names
    assert len({styles[item][1] for item in items}) == 4
    assert len(draw.styles([str(i) for i in range(20)])) == 20
    found = [draw.item_of(read(compared / folder / "config.json")) for folder in FOLDERS]
    assert found == ["sft", "dss", "r2d", "r2d,no-stage1,schedule=none"]


def test_bad_files_end_in_one_line_and_nothing_is_written(copy: Path, capsys) -> None:
    """Catches a traceback from a damaged file, a table without the run, an empty picture."""
    for run, name in (("r2d-1", "metrics.json"), ("r2d-3", "log.jsonl"), ("dss-1", "config.json")):
        (copy / run / name).write_bytes((copy / run / name).read_bytes()[:-9])
        arguments = [run[:3], "--seeds", run[4], "--out", copy, *OPTIONS]
        assert run in refusal(capsys, compare.main, *arguments)
    assert "r2d-1" in refusal(capsys, draw.main, copy / "r2d-1", copy / "out.png")
    (copy / "sft.json").write_text(json.dumps({"sft": read(copy / "compare.json")[ITEMS[0]]}))
    for source in ("sft.json", "nix", "nix.json"):
        assert source in refusal(capsys, draw.main, copy / source, copy / "out.png")
    (copy / "dss-1" / "predictions.jsonl").write_text('{"label": ')
    for run, named in ((FOLDERS[0], "no rationales"), ("dss-1", "dss-1"), ("r2d-1", "no-t5")):
        assert named in refusal(capsys, bertscore.main, copy / run, "--encoder", copy / "no-t5")


def test_scripts_find_the_core_and_explain_themselves(tmp_path: Path) -> None:
    """Catches an import that only works in the repository's folder."""
    for script in ("compare.py", "bertscore.py", "draw.py"):
        command = [sys.executable, ROOT / "notebooks" / script, "-h"]
        assert script in subprocess.check_output(command, cwd=tmp_path, text=True)
