"""notebooks/llm.py against a real server on this machine that answers well, badly or not at all."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from helpers import ROOT, contents, lines, read, write_notes

sys.path.insert(0, str(ROOT / "notebooks"))

import llm

import data
import metrics

KEY = "sk-S3cret+key"
GRADES = '{"supports": 5, "grounded": 4, "agrees": 3}'
TOLD = '{"label": "Go To ED now", "rationale": "With a fever, go to ED now."}'
ROW = {"question": "a {note}\u2028", "label": "a", "predicted_label": "b", "flipped_label": "c"}


class Handler(BaseHTTPRequestHandler):
    """Each request meets the next behaviour of the server's script; the last one stays."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.key = self.headers["Authorization"]
        self.server.keys.append(self.key)
        self.server.prompts.append(body["messages"][0]["content"])
        self.server.settings.append((body["model"], body["temperature"]))
        script = self.server.script
        behaviour = script.pop(0) if len(script) > 1 else script[0]
        behaviour(self)

    def log_message(self, *_: object) -> None:
        pass


def sends(status: int, body: str = "{}", **headers: str) -> Callable[[Handler], None]:
    def behaviour(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {"content_type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("retry-after-ms", "1")
        handler.end_headers()
        handler.wfile.write(body.replace("{KEY}", handler.key).encode())

    return behaviour


def says(content: object) -> Callable[[Handler], None]:
    return sends(200, json.dumps({"choices": [{"message": {"content": content}}]}))


def hang_up(handler: Handler) -> None:
    pass


def wait(handler: Handler) -> None:
    time.sleep(2)
    says(GRADES)(handler)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    servers = []

    def start(*script: Callable) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.script = list(script)
        server.keys = []
        server.prompts = []
        server.settings = []
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        server.handle_error = lambda *_: None  # a client that hung up is no news
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    monkeypatch.setenv("R2D_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(llm, "RETRIES", 1)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of three test notes, explained under three labels."""
    text = ""
    for i in range(3):
        row = {**ROW, "rationale": f"because {i}"}
        for condition in ["gold", "predicted", "flipped"]:
            row[f"rationale_given_{condition}"] = f"{condition} {i}"
        text += json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "predictions.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def judge(run: Path, url: str, *options: str) -> int:
    return llm.main(["judge", str(run), "--url", url, "--model", "wise", *options])


def zeroshot(out: Path, url: str, *options: str) -> int:
    where = ["--out", str(out), "--url", url, "--model", "wise", "--limit", "12"]
    return llm.main(["zeroshot", *where, *options])


def refusal(capsys: pytest.CaptureFixture) -> str:
    """The one line of a refusal, without the key."""
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("llm.py: ")
    assert "S3cret" not in shown.err
    return shown.err


def test_a_judge_grades_every_condition(serve, run, capsys) -> None:
    """Catches texts, labels or grades mixed up between conditions, and other files touched."""
    server = serve(says(GRADES))
    before = contents(run)
    assert judge(run, server.url) == 0
    after = contents(run)
    result = json.loads(after.pop("judge.json"))
    assert len(after.pop("answers.jsonl")) > 0 and after == before
    assert list(result) == ["model", "gold", "predicted", "flipped"] and result["model"] == "wise"
    expected = []
    for condition, label in [("gold", "a"), ("predicted", "b"), ("flipped", "c")]:
        scores = result[condition]
        assert [scores[name] for name in llm.GRADES] == [5, 4, 3] and scores["n"] == 3
        assert scores["supports_ci95"] == [5, 5] and scores["malformed"] == 0
        for i in range(3):
            texts = f"Label given: {label}\nExplanation: {condition} {i}\nReference: because {i}"
            expected.append(f"Note: a {{note}}\u2028\n{texts}")
    assert sorted(prompt.split("\n\n")[1] for prompt in server.prompts) == sorted(expected)
    assert '{"supports": 1-5, "grounded": 1-5, "agrees": 1-5}' in server.prompts[0]
    assert set(server.settings) == {("wise", 0)}
    header, *table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and {len(line) for line in table} == {len(header)}


def test_malformed_answers_are_counted_and_not_guessed() -> None:
    """Catches them as a grade of a mean, and left out of their share."""
    good = 'Sure: ```json\n{"supports": 3, "grounded": 2, "agrees": 1, "why": {}}```'
    bad = ["", "5 4 3", "{}", "[5, 4, 3]", '{"a": ' * 10**5 + "}"]
    for grade in ["0", "6", "2.5", '"5"', "true", "null", "[5]"]:
        bad.append(GRADES.replace("5", grade))
    scores = llm.judge_scores([GRADES, good, *bad])
    assert [scores[name] for name in llm.GRADES] == [4, 3, 2] and scores["n"] == 14
    assert scores["malformed"] == pytest.approx(100 * 12 / 14) and scores["agrees_ci95"] == [1, 3]
    assert "supports" not in llm.judge_scores(bad)


def test_no_answer_is_paid_for_twice(serve, run, capsys) -> None:
    """Catches answers lost at a failure, models mixed up, and a file that breaks at a cut line."""
    server = serve(*[says(GRADES)] * 4, sends(401))
    assert judge(run, server.url) == 2 and "AuthenticationError" in refusal(capsys)
    kept = {prompt for _, prompt, _ in lines(run / "answers.jsonl")}
    assert len(kept) == 4 and not (run / "judge.json").exists()
    server = serve(says(GRADES))
    for _ in range(2):
        assert judge(run, server.url) == 0
        assert len(server.prompts) == 5 and not kept & set(server.prompts)
    assert judge(run, server.url, "--model", "other") == 0 and len(server.prompts) == 14
    (run / "answers.jsonl").write_text((run / "answers.jsonl").read_text()[:-5])
    for _ in range(2):
        assert judge(run, server.url, "--model", "other") == 0 and len(server.prompts) == 15


ELSEWHERE = "http://127.0.0.1:1/v1/chat/completions"
ECHO = '{"error": {"message": "{KEY}", "code": "{KEY}"}}'
REFUSED = [  # a behaviour, what the message says of it, how often a prompt may be sent
    (sends(307, location=ELSEWHERE), "APIStatusError", 1),  # the key must not get there
    (sends(401, ECHO), "AuthenticationError", 1),
    (sends(404), "NotFoundError", 1),
    (sends(429), "RateLimitError", 2),
    (sends(500, ECHO), "InternalServerError", 2),
    (wait, "APITimeoutError", 2),
    (hang_up, "APIConnectionError", 2),
    (sends(200, "<p>{KEY}", content_type="text/html"), "no usable answer", 1),
]
for body in ["<p>{KEY}", "[1]", '{"a": 1}', '{"choices": []}', '{"choices": [{"message": {}}]}']:
    REFUSED.append((sends(200, body), "no usable answer", 1))


@pytest.mark.parametrize(("behaviour", "word", "times"), REFUSED)
def test_an_endpoint_without_answers_is_refused(behaviour, word, times, serve, run, capsys) -> None:
    """Catches tracebacks, endless or missing retries, half-written files, a key in a message."""
    server = serve(behaviour)
    before = contents(run)
    assert judge(run, server.url, "--timeout", "1" if behaviour is wait else "20") == 2
    message = refusal(capsys)
    assert word in message and server.url in message and contents(run) == before
    assert max(map(server.prompts.count, server.prompts)) == times


def test_a_failure_that_passes_is_no_failure(serve, run, monkeypatch) -> None:
    """Catches a command that gives up at the first 429, 500 or time-out."""
    monkeypatch.setattr(llm, "RETRIES", 4)
    server = serve(sends(429), sends(500), wait, hang_up, says(GRADES))
    assert judge(run, server.url, "--timeout", "1") == 0 and len(server.prompts) == 13


@pytest.mark.parametrize(("key", "sent"), [(KEY, KEY), ("", "none"), (" support\n", "support")])
def test_the_key_is_sent_and_told_to_nobody(key, sent, serve, run, monkeypatch, capsys) -> None:
    """Catches a key in a file or on the screen, and answers garbled by a dummy key."""
    server = serve(says("{KEY}" + GRADES))
    monkeypatch.setenv("R2D_API_KEY", key)
    assert judge(run, server.url) == 0 and zeroshot(run, server.url) == 0
    assert set(server.keys) == {f"Bearer {sent}"}
    assert "S3cret" not in repr(capsys.readouterr()) + repr(contents(run))
    assert read(run / "judge.json")["gold"]["supports"] == 5


BAD_URLS = ["", "ftp://h/v1", "http://", "http://h:p/v1", "http://a b/v1", "http://a:S3cret@h/v1"]


@pytest.mark.parametrize("url", [*BAD_URLS, "http://h/v1?key=S3cret", "http://h/v1#S3cret"])
def test_wrong_options_are_refused(url, run, capsys) -> None:
    """Catches a traceback, minutes of retries, a secret that is shown, an option ignored."""
    assert judge(run, url) == 2 and "--url" in refusal(capsys)
    assert zeroshot(run / "new", url) == 2 and "--url" in refusal(capsys)
    with pytest.raises(SystemExit):
        judge(run, "http://h/v1", "--seed", "3")
    assert set(contents(run)) == {"predictions.jsonl"}


DAMAGED = ["", "x", "5", "{}", '{"rationale_given_gold": "g"}', json.dumps(ROW), '{"rationale"']
NOT_EXPLAINED = [{**ROW, "rationale": "r"}, {**ROW, "rationale_given_gold": "g", "rationale": ""}]


@pytest.mark.parametrize("content", [None, *DAMAGED, *map(json.dumps, NOT_EXPLAINED)])
def test_a_folder_without_rationales_is_refused(content, serve, run, capsys) -> None:
    """Catches a traceback, and money spent on half a run; a run of sft has no rationales."""
    (run / "predictions.jsonl").unlink()
    if content is not None:
        (run / "predictions.jsonl").write_text(content + "\n")
    server = serve(says(GRADES))
    before = contents(run)
    assert judge(run, server.url) == 2 and "predictions.jsonl: " in refusal(capsys)
    assert server.prompts == [] and contents(run) == before


def test_ctrl_c_keeps_what_was_paid_for(serve, run) -> None:
    """Catches a traceback, another status than 130, and requests sent after Ctrl-C."""
    server = serve(wait)
    command = [sys.executable, llm.__file__, "judge", run, "--url", server.url, "--model", "wise"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(server.prompts) < 8 and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    assert "Traceback" not in child.communicate(timeout=20)[1] and child.returncode == 130
    assert len(server.prompts) == 8 == len(lines(run / "answers.jsonl"))


def test_a_zero_shot_run_has_the_files_of_a_run(serve, tmp_path, capsys) -> None:
    """Catches a score that is missing, a right label lost to its case, and answers paid twice."""
    server = serve(says(TOLD))
    out = tmp_path / "new" / "run"
    assert zeroshot(out, server.url, "--seed", "3") == 0
    result = read(out / "metrics.json")
    rows = lines(out / "predictions.jsonl")
    header = {"method": "zeroshot", "data": "triage", "seed": 3, "updates": 0}
    assert result == header | json.loads(json.dumps(metrics.score(rows, data.DISPOSITIONS)))
    assert set(result) == {*header, "label", "rationale", "reader"} and len(rows) == 12
    test = data.load_data("triage", 3, 12, 12, 0.2, "llm", "llm").test
    assert [row["question"] for row in rows] == [example.question for example in test]
    assert set(result["rationale"]) == {"predicted", "predicted_wrong", "ceiling", "ceiling_gold"}
    assert {"majority_accuracy", "ceiling_accuracy"} < set(result["label"])
    for row in rows:
        assert row["predicted_label"] == row["argues_given_predicted"] == "go to ED now"
        assert row["rationale_given_predicted"] == json.loads(TOLD)["rationale"]
        assert row["ungrounded_given_predicted"] == data.ungrounded(TOLD, row["question"])
        assert row["argues_given_ceiling"] == row["ceiling_label"]
        assert row["argues_given_ceiling_gold"] == row["label"]
        asked = [prompt for prompt in server.prompts if prompt.endswith(f" {row['question']}")]
        assert len(asked) == 1 and json.dumps(data.DISPOSITIONS) in asked[0]
    assert metrics.table(result) in capsys.readouterr().out
    before = contents(out)
    assert set(before) == {"answers.jsonl", "metrics.json", "predictions.jsonl"}
    assert zeroshot(out, server.url, "--seed", "3") == 0 and len(server.prompts) == 12
    assert contents(out) == before


SAID = [
    ('```json\n{"rationale": " Bad. ", "label": " STAY\\n"}\n```', "stay", "Bad.", "go"),
    ('{"label": "go home", "rationale": "mild"}', "go home", "mild", "stay"),
    ("I would go.", "I would go.", "", None),
    ('{"label": "go", "rationale": null}', "go", "", None),
    ('{"label": ["go"], "rationale": 3}', "['go']", "3", None),
    ('{"label": "go\\ud800", "rationale": "bad \\ud800"}', "go?", "bad ?", "go"),
]


@pytest.mark.parametrize(("answer", "label", "rationale", "reads"), SAID)
def test_answers_about_own_data_are_read(answer, label, rationale, reads, serve, tmp_path) -> None:
    """Catches a label guessed, a crash at odd answers, and the checker of triage on other data."""
    own = write_notes(tmp_path / "own.csv")
    assert zeroshot(tmp_path / "run", serve(says(answer)).url, "--data", str(own)) == 0
    for row in lines(tmp_path / "run" / "predictions.jsonl"):
        assert row["predicted_label"] == label and row["rationale_given_predicted"] == rationale
        assert reads is None or row["argues_given_predicted"] == reads
        assert "ungrounded_given_predicted" not in row and "ceiling_label" not in row


def test_zero_shot_leaves_other_runs_alone(serve, run, capsys) -> None:
    """Catches a trained run that is overwritten, and files of a run that has no answers."""
    server = serve(sends(401))
    before = contents(run)
    assert zeroshot(run, server.url) == 2 and "AuthenticationError" in refusal(capsys)
    assert contents(run) == before
    (run / "config.json").write_text("{}")
    assert zeroshot(run, server.url) == 2 and "another --out" in refusal(capsys)
