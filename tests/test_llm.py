"""The optional language models: the client, the judge and the zero-shot baseline, against a real server on loopback."""

import json
import math
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import contents, lines, read

import metrics
import r2d

TINY = "--limit 12 --stage1-steps 2 --stage2-steps 4 --eval-every 4 --batch-size 4 --width 16 --heads 2 --layers 1"
TINY = [*TINY.split(), "--vocab-size", "400", "--max-target", "24"]
KEY = "sk-S3cret/+=-key"
LABEL = "go to ED now"
GRADES = '{"supports": 5, "grounded": 4, "agrees": 3}'
TOLD = json.dumps(
    {"label": LABEL, "rationale": "Chest pain can mean a heart attack. The safe choice is to go to ED now."}
)


# --- the server: each behaviour is a function of the handler and the prompt


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(sent) if sent else {}
        prompt = body.get("messages", [{}])[0].get("content")
        with self.server.lock:
            self.server.asked.append((self.path, self.headers, body, prompt))
            act = next(self.server.script, self.server.otherwise)
        act(self, prompt)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class Endpoint(ThreadingHTTPServer):
    """Does what the script says, then `otherwise`; keeps what it was asked: (path, headers, body, prompt)."""

    request_queue_size = 64

    def __init__(self, script: tuple[Callable, ...], otherwise: Callable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.otherwise, self.asked, self.lock = iter(script), otherwise, [], threading.Lock()
        self.url, self.closing = f"http://127.0.0.1:{self.server_port}/v1", threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None:  # a client that hung up is no news
        pass

    @property
    def prompts(self) -> list[str]:
        return [prompt for _, _, _, prompt in self.asked]


def raw(status: int, body: str | bytes = b"", **headers: str) -> Callable:
    content = body.encode() if isinstance(body, str) else body
    return lambda handler, prompt: handler.send(status, content, **headers)


def completion(content: object) -> str:
    return json.dumps({"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]})


def says(content: object) -> Callable:
    return raw(200, completion(content), Content_Type="application/json")


def parrot(handler: Handler, prompt: str) -> None:
    handler.send(200, completion(f"you said {prompt}").encode())


def drop(handler: Handler, prompt: str) -> None:
    handler.close_connection = True


def slow(handler: Handler, prompt: str) -> None:
    handler.server.closing.wait(5)  # beyond the time limit
    says("too late")(handler, prompt)


def cut(handler: Handler, prompt: str) -> None:
    handler.send(200, completion("x")[:20].encode(), Content_Length="999")
    handler.close_connection = True


def echo_key(content: str) -> Callable:
    """An answer in which KEY stands for what the Authorization header said."""
    return lambda handler, prompt: says(content.replace("KEY", handler.headers["Authorization"]))(handler, prompt)


def echo_status_line(handler: Handler, prompt: str) -> None:
    handler.wfile.write(f"Authorization: {handler.headers['Authorization']}\r\n\r\n".encode())
    handler.close_connection = True


Serve = Callable[..., Endpoint]


@pytest.fixture
def serve() -> Iterator[Serve]:
    endpoints = []

    def start(*script: Callable, otherwise: Callable = parrot) -> Endpoint:
        endpoints.append(Endpoint(script, otherwise))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.closing.set()
        endpoint.shutdown()
        endpoint.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No key, no proxy, and no waiting: the pauses that were asked for."""
    asked = []
    monkeypatch.delenv("R2D_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(metrics.time, "sleep", asked.append)
    return asked


def chat(url: str, cache: Path, model: str = "m", **options: float) -> metrics.Chat:
    return metrics.Chat(url, model, cache / "cache.jsonl" if cache.is_dir() else cache, **{"timeout": 10, **options})


def dead_url() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


def run(out: Path, *arguments: str) -> int:
    return r2d.main([*TINY, "--out", str(out), *arguments])


def zeroshot(out: Path, url: str, *arguments: str) -> int:
    return run(out, "--method", "zeroshot", "--llm", url, "--llm-model", "m", *arguments)


# --- the request


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_request_is_what_an_openai_endpoint_expects(end: str, serve: Serve, tmp_path: Path) -> None:
    """Catches a doubled or missing path, a temperature left to the server, and a system prompt sent along."""
    server, prompt = serve(), 'Wo tut es weh? "ä"\n{x} \u2028'
    assert list(chat(server.url + end, tmp_path)([prompt])) == [f"you said {prompt}"]
    ((path, headers, body, _),) = server.asked
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    assert body == {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    assert "Authorization" not in headers


@pytest.mark.parametrize(("key", "sent"), [(KEY, f"Bearer {KEY}"), (f" {KEY}\n", f"Bearer {KEY}"), ("", None)])
def test_the_key_is_sent_only_if_there_is_one(key: str, sent: str | None, serve: Serve, tmp_path, monkeypatch) -> None:
    """Catches a key that is not sent, "Bearer " without a key, and a line feed from a key file in the header."""
    monkeypatch.setenv("R2D_API_KEY", key)
    server = serve()
    list(chat(server.url, tmp_path)(["p"]))
    assert server.asked[0][1]["Authorization"] == sent


# --- failures


@pytest.mark.parametrize(
    "failure",
    [
        *(raw(status, "x") for status in (408, 429, 500, 502, 503)),
        drop,
        cut,
        raw(200, "<html>Please log in</html>", Content_Type="text/html"),
        raw(200, b"\xff\xfe"),
        raw(200, ""),
        raw(200, "[" * 100_000),
        *(raw(200, json.dumps(body)) for body in ({}, [], None, "x", {"choices": []}, {"choices": [{"message": 1}]})),
    ],
)
def test_a_failure_that_may_pass_is_tried_again(failure: Callable, serve: Serve, tmp_path: Path, pauses) -> None:
    """Catches a run of an hour that ends at the first hiccup, and a hiccup kept as an answer."""
    server = serve(failure, failure)
    assert list(chat(server.url, tmp_path)(["p"])) == ["you said p"]
    assert len(server.asked) == 3 and pauses == [1, 2]
    assert lines(tmp_path / "cache.jsonl") == [["m", "p", "you said p"]]


def test_an_answer_that_does_not_come_is_given_up(serve: Serve, tmp_path: Path, pauses) -> None:
    """Catches a request without a time limit, which hangs the whole run."""
    server = serve(slow)
    assert list(chat(server.url, tmp_path, timeout=0.5)(["p"])) == ["you said p"] and pauses[0] == 1


@pytest.mark.parametrize("content", [None, ["part"], 3, ""])
def test_a_content_that_is_no_text_is_an_empty_answer(content: object, serve: Serve, tmp_path: Path, pauses) -> None:
    """Catches a crash at "content": null, which endpoints send for a refusal, and asking for it again and again."""
    server = serve(otherwise=says(content))
    assert list(chat(server.url, tmp_path)(["p"])) == [""] and pauses == []
    assert list(chat(server.url, tmp_path)(["p"])) == [""] and len(server.asked) == 1


def test_pauses_double_and_end_with_the_last_try(serve: Serve, tmp_path: Path, pauses) -> None:
    """Catches a constant back-off, a pause after the last failure, and a message that does not say what to do."""
    server = serve(otherwise=raw(500))
    with pytest.raises(ConnectionError) as error:
        list(chat(server.url, tmp_path)(["p"]))
    message = str(error.value)
    assert len(server.asked) == 6 and pauses == [1, 2, 4, 8, 16]
    assert "\n" not in message and "500" in message and "R2D_API_KEY" in message
    assert server.url in message and "cache.jsonl" in message
    with pytest.raises(ConnectionError):
        list(chat(server.url, tmp_path, tries=2, pause=0.5)(["p"]))
    assert len(server.asked) == 8 and pauses[5:] == [0.5]


@pytest.mark.parametrize(
    ("asked", "waited"),
    [("7", 7), ("60", 60), ("86400", 60), ("0", 1), ("-5", 1), ("1.5", 1), ("Fri, 31 Dec 1999 23:59:59 GMT", 1)],
)
def test_retry_after_is_obeyed_up_to_a_minute(asked: str, waited: float, serve: Serve, tmp_path: Path, pauses) -> None:
    """Catches hammering an endpoint that asked for a pause, a pause of a day, and a crash at a date."""
    server = serve(raw(429, Retry_After=asked), raw(503, Retry_After=asked))
    assert list(chat(server.url, tmp_path)(["p"])) == ["you said p"]
    assert pauses == [waited, max(waited, 2)]


def test_a_retry_after_of_ten_thousand_digits_is_a_minute_at_most(serve: Serve, tmp_path: Path, pauses) -> None:
    """Catches a traceback: Python refuses to read a number that long."""
    server = serve(raw(429, Retry_After="9" * 10_000))
    assert list(chat(server.url, tmp_path)(["p"])) == ["you said p"] and 1 <= pauses[0] <= 60


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_will_not_pass_is_not_tried_again(status: int, serve: Serve, tmp_path: Path, pauses) -> None:
    """Catches half a minute of waiting for a wrong key, and a message that hides what the endpoint said."""
    server = serve(otherwise=raw(status))
    with pytest.raises(ConnectionError, match=f"HTTP {status}"):
        list(chat(server.url, tmp_path)(["p"]))
    assert len(server.asked) == 1 and pauses == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int, serve: Serve, tmp_path: Path, monkeypatch) -> None:
    """Catches a key that is carried to another host, and an answer from somewhere else."""
    monkeypatch.setenv("R2D_API_KEY", KEY)
    other = serve()
    for target in (f"{other.url}/chat/completions", "/elsewhere"):
        server = serve(otherwise=raw(status, Location=target))
        with pytest.raises(ConnectionError, match=f"HTTP {status}"):
            list(chat(server.url, tmp_path)(["p"]))
        assert other.asked == [] and len(server.asked) == 1


def test_a_dead_endpoint_is_not_asked_for_every_prompt(serve: Serve, tmp_path: Path) -> None:
    """Catches a run that goes on asking for a thousand prompts after the first one failed for good."""
    server = serve(otherwise=raw(401))
    with pytest.raises(ConnectionError):
        list(chat(server.url, tmp_path)([f"p{i}" for i in range(200)]))
    assert len(server.asked) < 100


def test_who_stops_reading_stops_asking(serve: Serve, tmp_path: Path) -> None:
    """Catches Ctrl-C after the first answer of a thousand, and the other answers paid for all the same."""

    def late(handler: Handler, prompt: str) -> None:
        handler.server.closing.wait(0.02)
        parrot(handler, prompt)

    server = serve(otherwise=late)
    answers = chat(server.url, tmp_path)([f"p{i}" for i in range(200)])
    assert next(answers) == "you said p0"
    answers.close()
    assert len(server.asked) < 100


@pytest.mark.parametrize("url", ["http://a..b/v1", f"http://{'x' * 70}/v1"])
def test_a_host_that_cannot_be_is_a_connection_error(url: str, tmp_path: Path) -> None:
    """Catches a traceback from the name of a host."""
    with pytest.raises(ConnectionError):
        list(chat(url, tmp_path)(["p"]))


# --- order and cache


def test_answers_come_in_the_order_of_the_prompts(serve: Serve, tmp_path: Path) -> None:
    """Catches answers in the order of arrival, and requests one by one: eight are open here, the last is first."""

    def last_first(handler: Handler, prompt: str) -> None:
        deadline = time.monotonic() + 10
        while prompt != "7" and str(int(prompt) + 1) not in one.answers and time.monotonic() < deadline:
            handler.server.closing.wait(0.005)
        parrot(handler, prompt)

    one = chat(serve(otherwise=last_first).url, tmp_path, timeout=20)
    assert list(one([str(i) for i in range(8)])) == [f"you said {i}" for i in range(8)]
    assert [line[1] for line in lines(tmp_path / "cache.jsonl")] == list("76543210")


def test_each_prompt_is_asked_once(serve: Serve, tmp_path: Path) -> None:
    """Catches paying twice: for a prompt that stands several times in a list, in two lists, or in an earlier run."""
    server = serve()
    one = chat(server.url, tmp_path)
    assert list(one(list("abacab"))) == [f"you said {c}" for c in "abacab"]
    assert sorted(server.prompts) == ["a", "b", "c"]
    assert list(one(["c", "d"])) == ["you said c", "you said d"] and server.prompts[3:] == ["d"]
    again = chat(server.url, tmp_path)
    assert list(again(list("dcba"))) == [f"you said {c}" for c in "dcba"] and len(server.asked) == 4


def test_the_cache_keeps_every_character(serve: Serve, tmp_path: Path) -> None:
    """Catches a cache that splits an answer at a line end, or loses letters beyond ASCII or half characters."""
    prompt, answer = 'ä"\n\\', 'ß\n\u2028\u0085\r\n{"x": "\\ud83d"}\ud83d 😀'
    server = serve(says(answer))
    assert list(chat(server.url, tmp_path)([prompt])) == list(chat(server.url, tmp_path)([prompt])) == [answer]
    assert len(server.asked) == 1


def test_an_answer_is_in_the_file_before_it_is_used(serve: Serve, tmp_path: Path) -> None:
    """Catches answers that are written at the end, and lost when the run is killed."""
    server = serve()
    for answer in chat(server.url, tmp_path)(["a", "b", "c"]):
        assert answer in [line[2] for line in lines(tmp_path / "cache.jsonl")]


def test_answers_of_another_model_are_not_used(serve: Serve, tmp_path: Path) -> None:
    """Catches a cache keyed by the prompt alone: two judges that always agree."""
    server = serve(says("one"), says("two"))
    assert list(chat(server.url, tmp_path, model="one")(["p"])) == ["one"]
    assert list(chat(server.url, tmp_path, model="two")(["p"])) == ["two"]
    assert list(chat(server.url, tmp_path, model="one")(["p"])) == ["one"]
    assert [body["model"] for _, _, body, _ in server.asked] == ["one", "two"]


def test_a_cut_last_line_costs_one_answer(serve: Serve, tmp_path: Path) -> None:
    """Catches a crash at the line a killed run left half written, and the next answer glued to it and lost."""
    server, path = serve(), tmp_path / "cache.jsonl"
    for prompt in "abc":
        list(chat(server.url, tmp_path)([prompt]))
    path.write_bytes(path.read_bytes()[:-4])
    assert list(chat(server.url, tmp_path)(["c", "a", "d"])) == ["you said c", "you said a", "you said d"]
    assert sorted(server.prompts[3:]) == ["c", "d"]
    list(chat(server.url, tmp_path)(list("abcd")))
    assert len(server.asked) == 5


def test_lines_that_are_no_answers_are_ignored(serve: Serve, tmp_path: Path) -> None:
    """Catches a traceback from a file that was edited by hand."""
    strange = ["", "null", "7", "{}", "[]", '["m"]', '["m", "p", "a", "b"]', '["m", ["p"], "a"]', '["m", "p"', "\0" * 9]
    (tmp_path / "cache.jsonl").write_text("\r\n".join(strange), encoding="utf-8")
    server = serve()
    assert list(chat(server.url, tmp_path)(["p"])) == ["you said p"]
    assert list(chat(server.url, tmp_path)(["p"])) == ["you said p"] and len(server.asked) == 1


def test_a_cache_that_is_damaged_is_read_as_far_as_it_goes(serve: Serve, tmp_path: Path) -> None:
    """Catches a traceback at bytes that are no text, as a crash of the machine leaves them."""
    server, path = serve(), tmp_path / "cache.jsonl"
    list(chat(server.url, tmp_path)(["a", "b"]))
    path.write_bytes(path.read_bytes() + b'\n["m", "c", "\xff\xfe')
    assert list(chat(server.url, tmp_path)(["a", "b", "c"])) == ["you said a", "you said b", "you said c"]
    assert server.prompts[2:] == ["c"]


def test_answers_before_a_failure_are_kept(serve: Serve, tmp_path: Path) -> None:
    """Catches an endpoint that dies in the middle and takes the answers along; the next run asks for the rest alone."""
    prompts = [str(i) for i in range(20)]
    server = serve(otherwise=lambda h, prompt: parrot(h, prompt) if int(prompt) < 10 else h.send(401, b""))
    arrived = []
    with pytest.raises(ConnectionError):
        arrived.extend(chat(server.url, tmp_path)(prompts))
    assert sorted(int(line[1]) for line in lines(tmp_path / "cache.jsonl")) == list(range(10))
    alive = serve()
    assert list(chat(alive.url, tmp_path)(prompts)) == [f"you said {i}" for i in range(20)]
    assert sorted(map(int, alive.prompts)) == list(range(10, 20))


def test_a_file_that_cannot_be_written_is_not_the_endpoints_fault(serve: Serve, tmp_path: Path) -> None:
    """Catches a full disk reported as a wrong URL after the same answer was paid for six times."""
    server = serve()
    with pytest.raises(OSError) as error:
        list(chat(server.url, tmp_path / "missing" / "cache.jsonl")(["p"]))
    assert len(server.asked) == 1 and not isinstance(error.value, ConnectionError)


# --- the key


@pytest.mark.parametrize(
    "failure",
    [
        lambda h, prompt: h.send(401, h.headers["Authorization"].encode()),
        lambda h, prompt: h.send(500, b"", Retry_After=h.headers["Authorization"]),
        lambda h, prompt: h.send(302, b"", Location=f"http://x/?{h.headers['Authorization']}"),
        lambda h, prompt: h.send(302, b"", Location=f"gopher://x/?{h.headers['Authorization']}"),
        lambda h, prompt: h.send(200, f"<html>{h.headers['Authorization']}".encode()),
        lambda h, prompt: h.send(200, f'{{"error": "{h.headers["Authorization"]}"}}'.encode()),
        lambda h, prompt: h.send_response(403, h.headers["Authorization"]) or h.end_headers(),
        echo_status_line,
        drop,
        cut,
    ],
)
def test_the_key_is_in_no_message(failure: Callable, serve: Serve, tmp_path: Path, monkeypatch) -> None:
    """Catches a key in the text of an error, which people paste into bug reports; one line, whatever was sent."""
    monkeypatch.setenv("R2D_API_KEY", KEY)
    server = serve(otherwise=failure)
    with pytest.raises(ConnectionError) as error:
        list(chat(server.url, tmp_path, tries=2)(["p"]))
    assert server.asked[0][1]["Authorization"] == f"Bearer {KEY}"
    said = str(error.value) + repr(error.value) + "".join(traceback.format_exception(error.value))
    assert KEY not in said and "\n" not in str(error.value)


def test_a_key_that_is_echoed_is_stored_nowhere(
    serve: Serve, trained: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    """Catches a key in the cache, the predictions, the scores, the configuration or on the screen."""
    monkeypatch.setenv("R2D_API_KEY", KEY)
    told = echo_key('{"label": "KEY", "rationale": "it is KEY, KEY"}')
    server, out = serve(echo_key("KEY"), otherwise=told), tmp_path / "run"
    judge = ["--judge", serve(otherwise=echo_key("KEY " + GRADES)).url, "--judge-model", "m"]
    assert zeroshot(out, server.url, *judge) == 0
    assert run(shutil.copytree(trained, tmp_path / "judged"), "--eval", *judge) == 0
    files = contents(out) | {f"judged/{name}": content for name, content in contents(tmp_path / "judged").items()}
    assert {"llm.jsonl", "judge.jsonl", "judged/judge.jsonl", "predictions.jsonl", "config.json"} <= set(files)
    assert b"Bearer (key)" in files["llm.jsonl"] and b"Bearer (key)" in files["predictions.jsonl"]
    assert [name for name, content in files.items() if KEY.encode() in content] == []
    shown = capfd.readouterr()
    assert KEY not in shown.out and KEY not in shown.err


@pytest.mark.parametrize(
    "key", ["sk s3cret", "sk\ns3cret", "sk\r\nX-Evil: s3cret", "sk-s3crät", "s3cret\u2028x", "s3\tt"]
)
def test_a_key_that_cannot_be_sent_is_refused_unseen(key: str, serve: Serve, tmp_path, monkeypatch, capfd) -> None:
    """Catches a second header smuggled in by the key, and a traceback that shows it."""
    monkeypatch.setenv("R2D_API_KEY", key)
    server = serve()
    with pytest.raises(ConnectionError, match="R2D_API_KEY") as error:
        chat(server.url, tmp_path)
    assert "s3" not in str(error.value)
    assert zeroshot(tmp_path / "run", server.url) == 2
    shown = capfd.readouterr()
    assert "s3" not in shown.out + shown.err and shown.err.count("\n") == 1
    assert server.asked == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@127.0.0.1:1/v1",
        "https://s3cret@127.0.0.1/v1",
        "http://user:a/b@s3cret@127.0.0.1/v1",
        "http://user:s3 cret@127.0.0.1/v1",
        "file:///etc/hostname",
        "ftp://127.0.0.1/v1",
        "127.0.0.1:8000/v1",
        "http://",
        "http:///v1",
        "http://127.0.0.1:/v1",
        "http://127.0.0.1:port/v1",
        "http://127.0.0.1:-1/v1",
        "http://127.0.0.1:8000/v 1",
        "http://127.0.0.1:8000/v1\nX: y",
        "http://127.0.0.1:8000/v1\r\n",
    ],
)
def test_what_is_no_endpoint_is_refused_before_anything_is_done(url: str, tmp_path: Path, capfd) -> None:
    """Catches a local file read as an answer, a password on the screen, and a run that trains before it looks."""
    with pytest.raises(ConnectionError) as error:
        chat(url, tmp_path)
    assert "s3" not in str(error.value)
    for arguments in (
        ["--judge", url, "--judge-model", "m"],
        ["--method", "zeroshot", "--llm", url, "--llm-model", "m"],
    ):
        assert run(tmp_path / "run", *arguments) == 2
        shown = capfd.readouterr()
        assert "s3" not in shown.out + shown.err and shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_port_beyond_65535_is_refused(serve: Serve, tmp_path: Path) -> None:
    """Catches a port taken modulo 65536 (glibc does that): the key goes to a service that nobody named."""
    server = serve()
    with pytest.raises(ConnectionError):
        list(chat(f"http://127.0.0.1:{server.server_port + 65536}/v1", tmp_path, tries=1)(["p"]))
    assert server.asked == []


# --- reading the answers


@pytest.mark.parametrize(
    ("answer", "record"),
    [
        ('{"a": 1}', {"a": 1}),
        (' \n{"a": "x\\ny"}\n', {"a": "x\ny"}),
        ('```json\n{\n  "a": 1\n}\n```', {"a": 1}),
        ('Sure! Here it is: {"a": 1}. Anything else?', {"a": 1}),
        ('{"a": {"b": [1, {"c": 2}]}}', {"a": {"b": [1, {"c": 2}]}}),
        ('{"a": "}{"}', {"a": "}{"}),
        ('{"a": 1} or {"a": 2}', {}),
        ('{"a": 1, "b": {"c": 2}, "d": "tr', {}),
        ('{"a": 1', {}),
        ("['a']", {}),
        ("[1, 2]", {}),
        ("no JSON at all", {}),
        ("", {}),
        ("{}", {}),
        ("}{", {}),
        ("{'a': 1}", {}),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, {}, id="deep"),
    ],
)
def test_json_answer_finds_the_object_or_nothing(answer: str, record: dict) -> None:
    """Catches a fence or a sentence around the object taken for malformed, and a crash at what is malformed."""
    assert metrics.json_answer(answer) == record


def test_json_answer_survives_odd_numbers() -> None:
    """Catches a crash at what Python reads though it is no JSON, or does not read though it is."""
    assert math.isnan(metrics.json_answer('{"a": NaN}')["a"])
    assert isinstance(metrics.json_answer('{"a": ' + "9" * 10_000 + "}"), dict)


ROW = {"question": "Note {x}", "label": "go", "text": "Because {0}.", "reference": "R"}


@pytest.mark.parametrize("grade", ["0", "6", "-1", "3.5", "3.0", '"4"', "true", "null", "[3]", "NaN", "1e400", None])
def test_a_grade_is_a_whole_number_from_1_to_5(grade: str | None, serve: Serve, tmp_path: Path) -> None:
    """Catches 0, 6, true or "4" counted as a grade, and a missing one made up: malformed is malformed."""
    answer = '{"supports": 5, "grounded": 1' + (f', "agrees": {grade}' if grade else "") + "}"
    server = serve(says(answer), says("```json\n" + GRADES + "\n```"))
    rows = [ROW, {**ROW, "text": "other"}]
    assert list(metrics.judge(chat(server.url, tmp_path), rows[:1])) == [None]
    assert list(metrics.judge(chat(server.url, tmp_path), rows)) == [None, [5, 4, 3]]


def test_the_judge_reads_all_it_grades(serve: Serve, tmp_path: Path) -> None:
    """Catches a prompt that lacks the note, the label, the explanation or the reference, and braces that are eaten."""
    server = serve(otherwise=says(GRADES))
    list(metrics.judge(chat(server.url, tmp_path), [ROW]))
    assert all(f": {text}" in server.prompts[0] for text in ROW.values()) and "{{" not in server.prompts[0]
    assert '{"supports": 1-5, "grounded": 1-5, "agrees": 1-5}' in server.prompts[0]


def test_judge_scores_are_those_worked_out_by_hand() -> None:
    """Catches means over the malformed, swapped columns, and malformed answers counted as the lowest grade."""
    scores = metrics.judge_scores([[5, 1, 3], None, [4, 2, 3], [3, 3, 3]])
    assert scores["judge_malformed"] == 25
    assert [scores[f"judge_{name}"] for name in ("supports", "grounded", "agrees")] == [4, 2, 3]
    assert scores["judge_agrees_ci95"] == [3, 3]
    low, high = scores["judge_supports_ci95"]
    assert 3 <= low <= 4 <= high <= 5


@pytest.mark.parametrize("grades", [[None, None], []])
def test_a_judge_without_one_valid_answer_has_no_mean(grades: list, tmp_path: Path) -> None:
    """Catches a crash, nan, or a grade of 0 where there is none."""
    assert metrics.judge_scores(grades) == {"judge_malformed": 100}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"label": "Go To ED Now", "rationale": " Because. "}', ("go to ED now", "Because.")),
        ('```json\n{"rationale": "Because.", "label": " HOME CARE\\n"}\n```', ("home care", "Because.")),
        ('{"label": "go home", "rationale": "Because."}', ("go home", "Because.")),
        ('{"label": "go"}', ("go", "")),
        ('{"rationale": "Because."}', ('{"rationale": "Because."}', "Because.")),
        ("I would go to ED now.", ("I would go to ED now.", "")),
        ("Go to ed now", ("go to ED now", "")),
        ("", ("", "")),
        ('{"label": ["home care"], "rationale": 3}', ("['home care']", "3")),
        ('{"label": 3, "rationale": ["x"]}', ("3", "['x']")),
        ('{"label": {"a": NaN}, "rationale": true}', ("{'a': nan}", "True")),
        ('{"label": "x\\ud800", "rationale": "half \\ud800."}', ("x?", "half ?.")),
        ("x\ud800", ("x?", "")),
    ],
)
def test_zero_shot_reads_label_and_rationale(answer: str, expected: tuple, serve: Serve, tmp_path: Path) -> None:
    """Catches a right label counted as wrong for its case, a wrong one made right, and a crash at odd types."""
    server = serve(says(answer))
    assert list(metrics.zero_shot(chat(server.url, tmp_path), ["q"], [LABEL, "home care"])) == [expected]


def test_a_rationale_of_null_is_no_rationale(serve: Serve, tmp_path: Path) -> None:
    """Catches the word None, which nobody wrote, scored as an explanation."""
    server = serve(says('{"label": "home care", "rationale": null}'))
    assert list(metrics.zero_shot(chat(server.url, tmp_path), ["q"], [LABEL, "home care"])) == [("home care", "")]


def test_the_zero_shot_prompt_has_question_and_labels(serve: Serve, tmp_path: Path) -> None:
    """Catches labels that the model is not told, and a question changed by its braces."""
    server = serve()
    list(metrics.zero_shot(chat(server.url, tmp_path), ["Text {x} {0}?"], [LABEL, "für Ärzte"]))
    assert f'["{LABEL}", "für Ärzte"]' in server.prompts[0] and server.prompts[0].endswith("Text {x} {0}?")
    assert '{"label": "one of the labels", "rationale": "your explanation"}' in server.prompts[0]


# --- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole tiny run; made without a network: see the test after it."""
    out = tmp_path_factory.mktemp("trained") / "run"

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", forbidden)
        patch.setattr(socket, "getaddrinfo", forbidden)
        patch.setenv("R2D_API_KEY", KEY)
        assert run(out) == 0 and run(out, "--eval") == 0
    return out


def test_a_run_that_asks_no_model_opens_no_socket(trained: Path) -> None:
    """Catches a download, a telemetry call or a judge that is asked unasked, and a key that is stored."""
    result = read(trained / "metrics.json")
    assert "judge" not in result and not any("judge" in key for s in result["rationale"].values() for key in s)
    assert not {"judge.jsonl", "llm.jsonl"} & set(contents(trained))
    assert not any(KEY.encode() in content for content in contents(trained).values())


def test_a_zero_shot_run_has_scores_and_no_weights(serve: Serve, tmp_path: Path, capsys) -> None:
    """Catches a baseline that trains, has conditions it cannot have, misses a score, or pays again when called."""
    server, out = serve(otherwise=says(TOLD)), tmp_path / "run"
    assert zeroshot(out, server.url) == 0
    assert set(contents(out)) == {"config.json", "llm.jsonl", "predictions.jsonl", "metrics.json", "lock"}
    result, rows = read(out / "metrics.json"), lines(out / "predictions.jsonl")
    right = sum(row["label"] == LABEL for row in rows)
    assert len(rows) == 12 and len(set(server.prompts)) == len(server.asked) <= 12 and 0 < right < 12
    assert result["method"] == "zeroshot" and result["updates"] == 0
    assert result["label"]["accuracy"] == pytest.approx(100 * right / 12) and result["label"]["invalid"] == 0
    assert {"macro_f1", "per_class", "ceiling_accuracy", "majority_accuracy"} <= set(result["label"])
    assert set(result["rationale"]) == {"predicted", "predicted_wrong"} and "exposure" not in result
    scores = result["rationale"]["predicted"]
    assert {"bleu", "sentence_bleu", "argues_given", "argues_gold", "grounded"} <= set(scores) and "nll" not in scores
    assert scores["argues_given"] == 100 and scores["argues_gold"] == pytest.approx(100 * right / 12)
    assert scores["n"] == 12 and result["rationale"]["predicted_wrong"]["n"] == 12 - right
    for row in rows:
        assert row["predicted_label"] == LABEL and row["rationale_given_predicted"] == json.loads(TOLD)["rationale"]
        assert row["rationale_given_gold"] is row["rationale_given_flipped"] is None and row["question"]
    assert "argues given" in capsys.readouterr().out
    before, asked = contents(out), len(server.asked)
    assert zeroshot(out, server.url) == 0 and "finished" in capsys.readouterr().out
    assert r2d.main(["--out", str(out)]) == 0 and contents(out) == before and len(server.asked) == asked


def test_a_zero_shot_run_survives_what_models_say(serve: Serve, tmp_path: Path) -> None:
    """Catches a crash while scores and files are written: half characters, no JSON, nothing, labels of other types."""
    odd = [
        '{"label": "\\ud800", "rationale": "\\udfff"}',
        "\ud800",
        "no idea",
        "",
        None,
        '{"label": [1], "rationale": 2}',
    ]
    odd += [f'{{"label": "{LABEL.upper()}", "rationale": ""}}']
    assert zeroshot(tmp_path / "run", serve(*map(says, odd), otherwise=says("x")).url) == 0
    result, rows = read(tmp_path / "run" / "metrics.json"), lines(tmp_path / "run" / "predictions.jsonl")
    assert result["label"]["invalid"] == pytest.approx(100 * 11 / 12)
    assert sum(row["predicted_label"] == LABEL for row in rows) == 1


def test_a_zero_shot_run_goes_on_where_the_endpoint_died(serve: Serve, tmp_path: Path, capsys) -> None:
    """Catches an endpoint's failure that costs what was paid for, a traceback, and scores of half a test set."""
    server, out = serve(*[says(TOLD)] * 5, raw(401), otherwise=raw(401)), tmp_path / "run"
    assert zeroshot(out, server.url) == 2
    message = capsys.readouterr().err.splitlines()
    assert sum("r2d.py:" in line for line in message) == 1 and "HTTP 401" in message[-1] and server.url in message[-1]
    assert not (out / "metrics.json").exists() and len(lines(out / "llm.jsonl")) == 5
    server.otherwise, asked = says(TOLD), len(server.asked)
    assert zeroshot(out, server.url) == 0
    assert len(server.asked) - asked == len(set(server.prompts)) - 5 and len(lines(out / "predictions.jsonl")) == 12


def test_a_judge_grades_every_condition(serve: Serve, trained: Path, tmp_path: Path, capsys) -> None:
    """Catches a condition without grades, a table without them, and a note, label or text mixed up between rows."""
    server, out = serve(otherwise=says(GRADES)), shutil.copytree(trained, tmp_path / "run")
    before = contents(out)
    assert run(out, "--eval", "--judge", server.url, "--judge-model", "wise") == 0
    result, shown = read(out / "metrics.json"), capsys.readouterr().out
    assert result["judge"] == "wise" and set(result["rationale"]) >= {"gold", "predicted", "flipped"}
    for scores in result["rationale"].values():
        assert [scores[f"judge_{name}"] for name in ("supports", "grounded", "agrees")] == [5, 4, 3]
        assert scores["judge_malformed"] == 0 and scores["judge_supports_ci95"] == [5, 5]
    table = shown[shown.index("judged 1-5 under") :].splitlines()
    assert table[0].split()[3:] == ["supports", "grounded", "agrees", "malformed", "n"]
    assert table[1].split()[:6] == ["gold", "5.00", "+-0.00", "4.00", "+-0.00", "3.00"] and "wise" in shown
    expected = {
        metrics.JUDGE.format(question=r["question"], label=label, text=text, reference=r["rationale"])
        for r in lines(out / "predictions.jsonl")
        for label, text in (
            (r["label"], r["rationale_given_gold"]),
            (r["predicted_label"], r["rationale_given_predicted"]),
            (r["flipped_label"], r["rationale_given_flipped"]),
        )
    }
    assert set(server.prompts) == expected and len(server.asked) == len(expected) == len(lines(out / "judge.jsonl"))
    after = contents(out)
    assert {name for name in after if after[name] != before.get(name)} == {"metrics.json", "judge.jsonl"}


def test_a_judge_that_only_babbles_is_reported_as_that(serve: Serve, trained: Path, tmp_path: Path, capsys) -> None:
    """Catches a crash in the table where no answer was valid."""
    out = shutil.copytree(trained, tmp_path / "run")
    assert run(out, "--eval", "--judge", serve(otherwise=says("Good.")).url, "--judge-model", "m") == 0
    scores = read(out / "metrics.json")["rationale"]["gold"]
    assert scores["judge_malformed"] == 100 and "judge_supports" not in scores
    assert "100.0" in capsys.readouterr().out.split("judged 1-5 under")[1]


def test_a_judge_that_is_down_costs_nothing_but_the_grades(serve: Serve, trained: Path, tmp_path: Path, capsys) -> None:
    """Catches a judge's failure that destroys a run, ends in a traceback, or has answers paid twice."""
    out = shutil.copytree(trained, tmp_path / "run")
    before = contents(out)
    assert run(out, "--eval", "--judge", dead_url(), "--judge-model", "m") == 2
    message = capsys.readouterr().err.splitlines()
    assert sum("r2d.py:" in line for line in message) == 1 and "R2D_API_KEY" in message[-1]
    assert "Traceback" not in "".join(message) and contents(out) == before
    server = serve(*[says(GRADES)] * 15, otherwise=raw(404))
    again = ["--eval", "--judge", server.url, "--judge-model", "m"]
    assert run(out, *again) == 2
    assert len(lines(out / "judge.jsonl")) == 15 and contents(out).items() >= before.items()
    server.otherwise, asked = says(GRADES), len(server.asked)
    assert run(out, *again) == 0
    assert len(server.asked) - asked == len(set(server.prompts)) - 15 == len(lines(out / "judge.jsonl")) - 15
    assert read(out / "metrics.json")["rationale"]["flipped"]["judge_supports"] == 5


def test_a_new_run_with_a_judge_that_is_down_is_not_trained_again(serve: Serve, tmp_path: Path, monkeypatch) -> None:
    """Catches an hour of training lost to an endpoint: predictions are there, and the same command only asks."""
    out, server = tmp_path / "run", serve(*[raw(404)] * 20, otherwise=says(GRADES))
    command = ["--method", "dss", "--judge", server.url, "--judge-model", "m"]
    assert run(out, *command) == 2
    assert {"stage2.pt", "predictions.jsonl"} <= set(contents(out)) and "metrics.json" not in contents(out)
    server.script = iter(())
    monkeypatch.setattr(r2d, "stage2_loss", None)  # a step of training would end in a traceback
    before = contents(out)
    assert run(out, *command) == 0 and contents(out).items() >= before.items()
    assert read(out / "metrics.json")["rationale"]["predicted"]["judge_agrees"] == 3


ENDPOINT = "http://127.0.0.1:1/v1"
ZEROSHOT = f"--method zeroshot --llm {ENDPOINT} --llm-model m"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (f"--judge {ENDPOINT}", "--judge-model"),
        ("--judge-model m", "--judge"),
        (f"--llm {ENDPOINT} --llm-model m", "--llm"),
        (f"--method sft --llm {ENDPOINT} --llm-model m", "--llm"),
        ("--llm-model m", "--llm"),
        ("--method zeroshot", "--llm"),
        ("--method zeroshot --llm-model m", "--llm"),
        (f"--method zeroshot --llm {ENDPOINT}", "--llm-model"),
        (f"--method zeroshot --judge {ENDPOINT} --judge-model m", "--llm"),
        ("--judge http://127.0.0.1:1/v1 --judge-model m --method sft", "--judge"),
        ("--judge http://127.0.0.1:1/v1 --judge-model m --stage 1", "--judge"),
        (f"{ZEROSHOT} --ask note", "--ask"),
        (f"{ZEROSHOT} --stage 1", "--stage"),
        (f"{ZEROSHOT} --init .", "--init"),
        (f"{ZEROSHOT} --judge {ENDPOINT}", "--judge-model"),
    ],
)
def test_options_in_conflict_end_in_one_line_and_status_2(arguments: str, named: str, tmp_path: Path, capsys) -> None:
    """Catches half a pair of options that is silently ignored, and a folder left behind."""
    assert run(tmp_path / "run", *arguments.split()) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and named in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("style", ["shared", "own"])
def test_compare_takes_zero_shot_beside_a_trained_method(style: str, serve: Serve, tmp_path: Path, capsys) -> None:
    """Catches options of the one method that are refused for the other, and a hole in the table."""
    server, out = serve(otherwise=says(TOLD)), tmp_path / "all"
    item = "zeroshot" if style == "shared" else f"zeroshot,llm={server.url},llm-model=m"
    shared = ["--llm", server.url, "--llm-model", "m"] if style == "shared" else []
    methods = ["--compare", item, "r2d", *shared, "--seeds", "0"]
    assert run(out, *methods) == 0
    rows = read(out / "compare.json")
    assert rows[item]["updates"] == 0 and rows["r2d"]["updates"] == 6 and rows[item]["bleu"]["mean"] > 0
    assert rows[item]["argues_given"]["mean"] == 100 and rows[item]["bleu_gold"]["mean"] is None
    asked = len(server.asked)
    assert run(out, *methods) == 0 and len(server.asked) == asked and item in capsys.readouterr().out


def test_a_finished_zero_shot_run_can_be_judged_from_another_port(serve: Serve, tmp_path: Path) -> None:
    """Catches answers that are paid for again because the endpoint moved, or because a judge came later."""
    out, server = tmp_path / "run", serve(otherwise=says(GRADES))
    assert zeroshot(out, serve(otherwise=says(TOLD)).url) == 0
    assert run(out, "--eval", "--llm", dead_url(), "--judge", server.url, "--judge-model", "j") == 0
    assert read(out / "metrics.json")["rationale"]["predicted"]["judge_supports"] == 5
