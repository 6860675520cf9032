"""notebooks/llm.py against a real server on this machine that answers well, badly or not at all."""

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import llm
import pytest
from helpers import contents, jsonl, lines, read, write, write_notes
from openai import OpenAI

import data
import metrics
import r2d

KEY = "sk-S3cret"
GRADES = "5 4 3"
TOLD = " go to ED now \n\nWith a fever, go to ED now.\n"
ROW = {"question": "a {note}\u2028", "label": "a", "predicted_label": "b", "flipped_label": "c"}
NO_TEXT = ['{"choices": null, "error": {}}', '{"choices": []}', '{"choices": [{"message": {}}]}']


class Handler(BaseHTTPRequestHandler):
    """Each request meets the next (status, body) of the server's script; the last one stays."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = str(self.headers["Authorization"])
        self.server.prompts.append(body["messages"][0]["content"])
        self.server.settings.append((key, body["model"], "temperature" in body))
        script = self.server.script
        status, text = script.pop(0) if len(script) > 1 else script[0]
        if status < 100:
            time.sleep(status)
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Location", text)  # for a redirect
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(text.replace("{KEY}", key).encode())


def says(content: str | list) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"content": content}}]})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Starts a server. The client's patience, 120 s and 4 retries, becomes 0.6 s and one."""

    def impatient(timeout: float, max_retries: int, **options: str) -> OpenAI:
        return OpenAI(timeout=timeout / 200, max_retries=max_retries // 4, **options)

    def start(*script: tuple[int, str]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.prompts, server.settings, server.script = [], [], list(script)
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        Thread(target=server.serve_forever, daemon=True).start()
        return server

    monkeypatch.setenv("R2D_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai.OpenAI", impatient)
    monkeypatch.setattr(Handler, "log_message", lambda *_: None)
    return start


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of three test notes, explained under three labels."""
    rows = []
    for i in range(3):
        rows.append({**ROW, "rationale": f"because {i}"})
        for condition in ("gold", "predicted", "flipped"):
            rows[i][f"rationale_given_{condition}"] = f"{condition} {i}"
    write(tmp_path / "predictions.jsonl", jsonl(rows))
    return tmp_path


def judge(run: Path, url: str, model: str = "wise") -> int:
    return llm.main(["judge", str(run), "--url", url, "--model", model])


def zeroshot(out: Path, url: str, *options: str) -> int:
    where = ["--out", str(out), "--url", url, "--model", "wise", "--limit", "12"]
    return llm.main(["zeroshot", *where, *options])


def refusal(capsys: pytest.CaptureFixture) -> str:
    """The one line of a refusal, without the key."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llm.py: ") and KEY not in err
    return err


def test_a_judge_grades_every_condition(serve, run) -> None:
    """Catches texts, labels or grades mixed up between conditions."""
    server = serve(says(GRADES))
    assert judge(run, server.url) == 0
    result = read(run / "judge.json")
    assert list(result) == ["model", "gold", "predicted", "flipped"] and result["model"] == "wise"
    expected = []
    for condition, label in [("gold", "a"), ("predicted", "b"), ("flipped", "c")]:
        scores = result[condition]
        assert [scores[name] for name in llm.GRADES] == [5, 4, 3] and scores["n"] == 3
        assert scores["supports_ci95"] == [5, 5] and scores["malformed"] == 0
        for i in range(3):
            texts = f"Label: {label}\nExplanation: {condition} {i}\nReference: because {i}"
            expected.append(f"Note: a {{note}}\u2028\n{texts}")
    assert sorted(prompt.split("\n\n")[0] for prompt in server.prompts) == sorted(expected)


def test_malformed_grades_are_counted_and_said(serve, run, capsys) -> None:
    """Catches them in a mean, not counted or not told, and a stop at a reply without a text."""
    no_text = [(200, body) for body in NO_TEXT]
    server = serve(says(" 3 2 1\n"), says([{"text": GRADES}]), says(""), *no_text, says("5 4"))
    assert judge(run, server.url) == 0
    result = read(run / "judge.json")
    assert [result["gold"][name] for name in llm.GRADES] == [4, 3, 2] and result["gold"]["n"] == 2
    assert result["predicted"] == result["flipped"] == {"n": 0, "malformed": 3}
    told = capsys.readouterr().err
    assert told.count("warning: 1 of 3 ") == 1
    assert told.count("WARNING, NOTHING TO SCORE: 3 of") == 2
    assert judge(run, serve(says(GRADES)).url) == 0  # asks again where there was no text
    assert [read(run / "judge.json")[name]["n"] for name in ("gold", "predicted")] == [3, 3]


HEADS = ["no", "**no**", "'No.'", "_NO_", "- no", "1. no", "**Label:** no", "The label is no."]
HEADS += ["Labels: yes, no\nno", "yes\n</think>no", "[THINK]yes[/THINK]no", '{"label": "no",']
TAILS = ["It rains.", "**Reason:** It rains.", "- `It rains.`", "2. It rains.\n<think>yes\nyes"]
SINGLE = ["no. It rains.", "No - It rains.", "<thinking>yes\n</thinking>no, It rains."]
SINGLE += ["Why: It rains.\nLabel: no", "Sure:\n\nno\n\nIt rains.", "It rains.\nno"]
UNCLEAR = ["", "yes or no", "yes, no", "yes/no", "yes\nno", "no?", "no-one", "No doubt.\nIt rains."]
UNCLEAR += ["not no", "Label: yes\nLabel: no", "<think>no\nIt rains.", "I would say so"]
GRADED = ["2 4 3.", "2, 4, 3", "2\n4\n3", "**2** **4** **3**", "2/5, 4/5 and 3 of 5", "2-4-3"]
GRADED += ["<think>1 1 1</think>2 4 3", "1. 2\n2. 4\n3. 3", "a: 2\nb: 4.0\nc: 3", "2 4 3\n3 facts"]
UNGRADED = ["4", "5 4 3 2", "6 4 3", "0 4 3", "4.5 4", "-1 4 3", "12 3", "2 4 3\n2 4 4"]


def test_replies_are_read_however_they_are_marked() -> None:
    """Catches a clear reply that is invalid, a thought or a mark in a reason, and a guess."""
    labels = ["yes", "no", "no, pets", "cafe\u0301"]
    replies = SINGLE.copy()
    for head in HEADS:
        replies += [f"{head}\n{tail}" for tail in TAILS]
    for reply in replies:
        assert llm.read_answer(reply, labels) == ("no", "It rains."), reply
    for reply in UNCLEAR:
        assert llm.read_answer(reply, labels)[0] not in labels, reply
    assert llm.read_answer("No,  **Pets**: <5", labels) == ("no, pets", "<5")
    assert llm.read_answer("Caf\u00e9\nYes, <5", labels) == ("cafe\u0301", "Yes, <5")
    for reply in GRADED + UNGRADED:
        assert llm.read_grades(reply) == ([2, 4, 3] if reply in GRADED else []), reply


def test_no_answer_is_paid_for_twice(serve, run, capsys) -> None:
    """Catches answers lost at a failure, models mixed up, and a file that breaks at a cut line; a
    bad URL that ends in a traceback or shows a secret."""
    for url in ["", "ftp://h/v1", "http://h:p/v1", f"http://a:{KEY}/v1"]:
        assert judge(run, url) == 2 and "check --url" in refusal(capsys)
    server = serve(says(GRADES), says(GRADES), (401, ""))
    assert judge(run, server.url) == 2 and "AuthenticationError" in refusal(capsys)
    kept = {prompt for _, prompt, _ in lines(run / "answers.jsonl")}
    assert len(kept) == 2 and not (run / "judge.json").exists()
    server = serve(says(GRADES))
    assert judge(run, server.url) == judge(run, server.url) == 0
    assert len(server.prompts) == 7 and not kept & set(server.prompts)
    assert judge(run, server.url, "other") == 0 and len(server.prompts) == 16
    (run / "answers.jsonl").write_text((run / "answers.jsonl").read_text()[:-5])
    assert judge(run, server.url, "other") == judge(run, server.url, "other") == 0
    assert len(server.prompts) == 17


REFUSED = [  # status and body, what is told, how often the prompt is sent
    ((400, '{"error": {"message": "no {KEY}"}}'), "BadRequestError: {'message': 'no Bearer (k", 1),
    ((401, "{KEY}"), "AuthenticationError: Bearer (key); check --url", 1),
    ((1, ""), "APITimeoutError", 2),  # a status below 100: so many seconds, and then no answer
    ((200, "<p>{KEY}"), "JSONDecodeError", 1),
    ((200, "[1]"), "AttributeError", 1),
]


@pytest.mark.parametrize(("answer", "words", "times"), REFUSED)
def test_an_endpoint_without_answers_is_refused(answer, words, times, serve, run, capsys) -> None:
    """Catches tracebacks, endless or missing retries, half-written files, a server unheard."""
    server = serve(answer)
    before = contents(run)
    assert judge(run, server.url) == 2 and words in refusal(capsys)
    assert contents(run) == {"answers.jsonl": b"", **before} and len(server.prompts) == times


@pytest.mark.parametrize("key", [KEY, ""])
def test_the_key_is_sent_and_told_to_nobody(key, serve, run, monkeypatch, capsys) -> None:
    """Catches a key in a file, on the screen or sent elsewhere, a temperature that some refuse."""
    monkeypatch.setenv("R2D_API_KEY", key)
    server = serve(says("{KEY}\n{KEY}"))
    assert judge(run, server.url) == 0 and zeroshot(run, server.url) == 0
    assert set(server.settings) == {(f"Bearer {key or 'R2D_API_KEY'}", "wise", False)}
    other = serve(says(GRADES))
    judge(run, serve((307, f"{other.url}/chat/completions")).url, "moved")
    assert KEY not in repr(capsys.readouterr()) + repr(contents(run)) + repr(other.settings)


DAMAGED = ["", "x", "5", "{}", json.dumps(ROW), '{"rationale_given_gold": "g"}']
DAMAGED.append(json.dumps({**ROW, "rationale_given_gold": "g", "rationale": ""}))


@pytest.mark.parametrize("content", DAMAGED)
def test_a_folder_without_rationales_is_refused(content, serve, run, capsys) -> None:
    """Catches a traceback, and money spent on half a run; a run of sft has no rationales."""
    (run / "predictions.jsonl").write_text(content + "\n")
    server = serve(says(GRADES))
    for folder in [run, run / "missing"]:
        assert judge(folder, server.url) == 2 and "predictions.jsonl: " in refusal(capsys)
    assert server.prompts == [] and set(contents(run)) == {"predictions.jsonl"}


def test_a_zero_shot_run_has_the_files_of_a_run(serve, tmp_path, capsys) -> None:
    """Catches a score that is missing, prompts of other notes, and a trained run overwritten."""
    server = serve(says(TOLD))
    out = tmp_path / "new" / "run"
    assert zeroshot(out, server.url, "--seed", "3") == 0
    rows = lines(out / "predictions.jsonl")
    result = {"method": "zeroshot", "data": "triage", "seed": 3}
    result |= metrics.score(rows, data.DISPOSITIONS)
    assert read(out / "metrics.json") == result
    test = data.load_data(r2d.parse_args(["--seed", "3", "--limit", "12"])).test
    assert [row["question"] for row in rows] == [example.question for example in test]
    for row in rows:
        assert row["predicted_label"] == row["argues_given_predicted"] == "go to ED now"
        assert row["rationale_given_predicted"] == "With a fever, go to ED now."
        assert row["ungrounded_given_predicted"] == data.ungrounded(TOLD, row["question"])
        prompt = llm.ZERO_SHOT.format(labels="\n".join(data.DISPOSITIONS), question=row["question"])
        assert server.prompts.count(prompt) == 1
    assert metrics.table(result) in capsys.readouterr().out
    assert set(contents(out)) == {"answers.jsonl", "metrics.json", "predictions.jsonl"}
    (out / "config.json").write_text("{}")
    assert zeroshot(out, server.url, "--seed", "3") == 2 and "another --out" in refusal(capsys)


def test_answers_about_own_data_are_read(serve, tmp_path, capsys) -> None:
    """Catches answers mixed up, a crash or silence at odd ones, and triage's checker here."""
    own = write_notes(tmp_path / "own.csv")
    server = serve(says("stay\r\nBad \ud800."), says("I would go."))
    assert zeroshot(tmp_path / "run", server.url, "--data", str(own)) == 0
    assert "llm.py: warning: 11 of 12 replies" in capsys.readouterr().err
    for row in lines(tmp_path / "run" / "predictions.jsonl"):
        told = ("I would go.", "")
        if f"Text: {row['question']}\n" in server.prompts[0]:
            told = ("stay", "Bad \ud800.")
        assert (row["predicted_label"], row["rationale_given_predicted"]) == told
        assert row["argues_given_predicted"] != "stay" and "ungrounded_given_predicted" not in row
