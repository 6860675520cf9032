"""notebooks/convert.py: what published files become. All files are made here."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import convert
import pytest
from helpers import POINTER, refusal, write

TEXT = 'He said "no, no",\r\nthen\nleft\rÉ \u2028 \U0001f912; \\'
ESNLI = ["s1", "s2", "labels", "preproc1_expl_1"]
pytestmark = pytest.mark.usefixtures("here")


def run(*arguments: str) -> dict[str, list[list[str]]]:
    """The rows of the three files, which must have the right header."""
    assert convert.main([*arguments, "out"]) == 0
    splits = {}
    for name in ("train", "val", "test"):
        with open(f"out/{name}.csv", encoding="utf-8", newline="") as file:
            header, *splits[name] = csv.reader(file, strict=True)
        assert header == ["question", "label", "rationale"]
    return splits


def pubmedqa(n: int) -> dict[str, dict]:
    items = {}
    for i in range(n):
        label = ["yes", "no", "maybe"][i % 3]
        items[f"id{i}"] = {"QUESTION": f"Is {i} bad?", "CONTEXTS": ["One.", "Two."]}
        items[f"id{i}"] |= {"final_decision": label, "LONG_ANSWER": f"Since {i}."}
    return items


def bioasq(n: int, **changes: object) -> dict[str, list]:
    question = {"type": "yesno", "snippets": [{"text": "A."}, {"text": "B."}]}
    question |= {"exact_answer": "Yes", "ideal_answer": ["First.", "Second."], **changes}
    return {"questions": [question | {"body": f"Is {i} bad?", "id": str(i)} for i in range(n)]}


def esnli(name: str, lines: list[tuple[str, str, str, str]]) -> None:
    """As published: the explanations lack the last line end."""
    for kind, texts in zip(ESNLI, zip(*lines, strict=True), strict=True):
        end = "" if kind.startswith("pre") else " \n"
        write(f"esnli/{kind}.{name}", " \n".join(texts) + end)


def premises(n: int, name: str = "dev") -> list[tuple[str, str, str, str]]:
    """Three hypotheses for each of n premises."""
    labels = ["neutral", "entailment", "contradiction"]
    return [(f"{name} {i // 3} .", f"H {i} .", labels[i % 3], f"e {i}") for i in range(3 * n)]


def test_pubmedqa(capsys):
    """Catches a lost context, a wrong column, ids not kept, foreign ids that stop or count; test
    ids taken from a file nobody named, other shares, splits that change; a question whose twin, in
    other letters or blanks, is learned and then tested; a csv or an encoding that breaks quotes,
    commas, line ends, letters, BOMs."""
    items = pubmedqa(50)
    source = write("ori_pqal.json", items)
    truth = write("test_ground_truth.json", {"id3": "", "id41": "", "foreign": "", "odd": ""})
    splits = run("pubmedqa", source)
    assert [len(splits[name]) for name in splits] == [40, 5, 5]
    numbers = [row[0].split()[1] for row in splits["test"]]
    assert numbers == ["12", "0", "27", "47", "7"]  # neither in order nor by chance
    capsys.readouterr()
    shutil.rmtree("out")
    items["twin"] = items["id3"] | {"QUESTION": "IS  3 bad?"}
    items["odd"] = {"QUESTION": TEXT, "CONTEXTS": [], "LONG_ANSWER": "left\rright"}
    items["odd"]["final_decision"] = ' a,"b"\n'
    write(source, "\ufeff" + json.dumps(items))
    splits = run("pubmedqa", source, truth)
    expected = [["Is 3 bad? One. Two.", "yes", "Since 3."], [TEXT, 'a,"b"', "left\rright"]]
    expected.append(["Is 41 bad? One. Two.", "maybe", "Since 41."])
    assert sorted(splits["test"]) == sorted(expected)
    assert [len(splits["train"]), len(splits["val"])] == [43, 5]  # of 48, a tenth is val
    assert len({row[0] for row in splits["train"] + splits["val"] + splits["test"]}) == 51
    printed = capsys.readouterr().out
    assert f"1 ids of {truth}" in printed and "1 of train skipped: also" in printed
    assert 'test: 3 examples: a,"b" 1, maybe 1, yes 1\n' in printed


def test_bioasq():
    """Catches other types taken, a list kept as such, a question of two files told twice."""
    old, new = bioasq(30), bioasq(40, exact_answer=["No"], ideal_answer="Only.", snippets=[])
    del new["questions"][39]["snippets"]
    old["questions"].insert(0, {"type": "list", "body": "Which?", "id": "x", "snippets": []})
    splits = run("bioasq", write("old.json", old), write("new.json", new))
    assert [len(splits[name]) for name in splits] == [32, 4, 4]
    expected = [[f"Is {i} bad? A. B.", "yes", "First."] for i in range(30)]
    expected += [[f"Is {i} bad?", "no", "Only."] for i in range(30, 40)]
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == sorted(expected)


def test_esnli_without_train(capsys):
    """Catches a premise in two splits, lines that slip, "-" as a label, a changed test."""
    bad = [("P .", "H .", "-", "e"), ("P .", "H .", "", "e"), ("P .", "", "neutral", "e")]
    esnli("dev", [*premises(40), ("Test  0 .", "H .", "neutral", "e"), *bad])
    esnli("test", premises(4, "test"))
    splits = run("esnli", "esnli")
    assert splits["test"][4] == ["premise: test 1 . hypothesis: H 4 .", "entailment", "e 4"]
    assert [len(splits[name]) for name in splits][1:] == [12, 12]  # a tenth of 42 premises
    rows = splits["train"] + splits["val"]
    expected = {f"premise: {p} hypothesis: {h}": [label, e] for p, h, label, e in premises(40)}
    assert {row[0]: row[1:] for row in rows} == expected
    found = Counter()  # in how many splits a premise stands
    for rows in splits.values():
        found.update({row[0].split(" hyp")[0] for row in rows})
    assert len(found) == 44 and set(found.values()) == {1}
    printed = capsys.readouterr().out
    assert "3 of train skipped: without" in printed and "1 of train skipped: also" in printed


def test_esnli_with_train():
    """Catches published splits that are not kept, a premise of val or test in train."""
    esnli("dev", [("D .", "H .", "neutral", "e"), ("T .", "H .", "neutral", "e")])
    esnli("test", [("T .", "H .", "neutral", "e")])
    esnli("train", [(premise, "H .", "neutral", "e") for premise in ("A .", "t  .", "B .", "d .")])
    splits = run("esnli", "esnli")
    assert [row[0][9:10] for row in splits["train"]] == ["A", "B"]
    assert [row[0][9:10] for row in splits["val"] + splits["test"]] == ["D", "T"]


# Case: the file that is bad, and its content
ONE = pubmedqa(1)["id0"]
ASKED = bioasq(30)["questions"]
BAD = []
for content in ("", "[3]", "null", "[" * 100_000, POINTER.decode(), "\0", json.dumps(ONE) * 2):
    BAD += [("p.json", content), ("b.json", content), ("t.json", content)]
BAD += [("p.json", bioasq(30)), ("p.json", pubmedqa(4)), ("p.json", pubmedqa(30) | {"x": "yes"})]
BAD += [("b.json", pubmedqa(30)), ("b.json", bioasq(2)), ("b.json", {"questions": 3})]
BAD += [("b.json", {"questions": [*ASKED, 3]}), ("t.json", pubmedqa(30)), ("t.json", {"x": "yes"})]
for value in (None, 3, [3], "\ud83d"):
    for key in ONE:
        BAD.append(("p.json", pubmedqa(30) | {"x": ONE | {key: value}}))
    for key in ("body", "snippets", "exact_answer", "ideal_answer"):
        BAD.append(("b.json", {"questions": [*ASKED, ASKED[0] | {key: value}]}))
COMMANDS = {"p.json": "pubmedqa p.json out", "b.json": "bioasq g.json b.json out"}
COMMANDS |= {"t.json": "pubmedqa o.json t.json out"}


@pytest.mark.parametrize(("name", "content"), BAD)
def test_bad_json_is_refused(name, content, capsys):
    """Catches a traceback, a guess, a message without the file, a folder that is left behind."""
    write("g.json", {"questions": []})
    write("o.json", pubmedqa(30))
    write(name, content)
    assert name in refusal(capsys, convert.main, *COMMANDS[name].split())


@pytest.mark.parametrize("split", ["dev", "test", "train"])
@pytest.mark.parametrize("content", [None, b"neutral", b"a\n" * 91, b"a\n\n" * 90, b"\xff\n" * 90])
def test_bad_parallel_files_are_refused(split, content, capsys):
    """Catches lines that slip against each other, a file that is not looked for or not named."""
    for name in ("dev", "test", "train"):
        esnli(name, premises(30, name))
    for kind in ESNLI[1:]:
        path = Path(f"esnli/{kind}.{split}")
        good = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert path.name in refusal(capsys, convert.main, "esnli", "esnli", "out")
        path.write_bytes(good)


def test_bad_commands_are_refused(capsys):
    """Catches a file or a folder written over, a source taken for OUT_DIR, one that is ignored;
    the three lines of Git LFS pointers, read as three premises, labels and so on."""
    write("o.json", pubmedqa(30))
    write("full/val.jsonl", "mine")
    esnli("test", premises(30))
    for kind in ESNLI:
        write(f"esnli/{kind}.dev", POINTER.decode())
    commands = {"pubmedqa o.json full": "val.jsonl", "esnli esnli out": "git lfs pull"}
    commands |= {"bioasq none.json out": "none.*published", "pubmedqa o.json o.json/out": "OUT_DIR"}
    commands |= {"pubmedqa o.json o.json extra out": "extra", "esnli esnli extra out": "extra"}
    commands |= {"other o.json out": "other", "pubmedqa o.json": "OUT_DIR"}
    for command, words in commands.items():
        assert re.search(words, refusal(capsys, convert.main, *command.split())), command
