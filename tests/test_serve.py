"""The OpenAI-compatible server: the answers of `generate`, over a socket; what it would leave out is refused."""

import base64
import http.client
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import uvicorn

import midasheng
from midasheng.evaluate.judge import Judge
from midasheng.inference import Listener
from midasheng.serve import Room, app
from tests.test_inference import WAVE, hand_off


def wav(wave: np.ndarray = WAVE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def heard(clip: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "wav"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def ask(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 8, **more}


@pytest.fixture(scope="module")
def listener(chat, tmp_path_factory) -> Listener:
    folder = tmp_path_factory.mktemp("run")
    hand_off(folder / "weights", chat)
    return midasheng.load(folder)


@pytest.fixture(scope="module")
def url(listener) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as open_socket:
        server = uvicorn.Server(uvicorn.Config(app(listener, "tiny"), log_level="error"))
        thread = threading.Thread(target=server.run, args=([open_socket],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{open_socket.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


def post(url: str, body: object) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", data), timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def said(url: str, body: object) -> str:
    status, told = post(url, body)
    assert status == 200, told
    return told["choices"][0]["message"]["content"]


def test_it_answers_as_generate_does(listener, url):
    wanted = listener.generate(WAVE, "What sounds?", max_new_tokens=8)
    status, told = post(url, ask(heard(wav()), text("What sounds?"), model="tiny"))
    assert status == 200
    assert told["choices"][0]["message"] == {"role": "assistant", "content": wanted.text}
    assert told["choices"][0]["finish_reason"] == wanted.finish == "length"
    assert told["usage"] == {
        "prompt_tokens": wanted.prompt_tokens, "completion_tokens": 8, "total_tokens": wanted.prompt_tokens + 8
    }  # fmt: skip
    assert wanted.text != listener.generate(WAVE[:9_000], "What sounds?", max_new_tokens=8).text
    with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
        assert [m["id"] for m in json.load(answer)["data"]] == ["tiny"]


def test_all_that_a_request_says_reaches_the_model(listener, url):
    """A system turn, text before the clip, two clips, a conversation, a data: URL, sampling."""
    drawn = {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": 3}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [text("Listen."), heard(wav()), heard(wav(WAVE[:9_000]))]},
        {"role": "assistant", "content": "I do."},
        {"role": "user", "content": "And now?"},
    ]
    wanted = listener.generate(
        [WAVE, WAVE[:9_000]], "And now?", system="Be short.", text_first=True, history=[("Listen.", "I do.")],
        max_new_tokens=8, **drawn,
    )  # fmt: skip
    found = {"messages": messages, "max_completion_tokens": 8, **drawn}
    assert said(url, found) == wanted.text
    for change in ({"seed": 4}, {"messages": messages[1:]}, {"temperature": 0.0}):
        assert said(url, found | change) != wanted.text
    spoken = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + base64.b64encode(wav()).decode()}}
    assert said(url, ask(spoken, text("Hm?"))) == listener.generate(WAVE, "Hm?", max_new_tokens=8).text
    assert said(url, ask(text("Hm?"))) == listener.generate(None, "Hm?", max_new_tokens=8).text


def events(answer: http.client.HTTPResponse) -> Iterator[str]:
    for line in answer:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


def test_a_stream_is_the_same_answer(listener, url):
    body = ask(heard(wav()), text("What sounds?"), stream=True, stream_options={"include_usage": True})
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as answer:
        *found, last = events(answer)
    assert last == "[DONE]"
    *chunks, end, usage = [json.loads(line) for line in found]
    wanted = listener.generate(WAVE, "What sounds?", max_new_tokens=8)
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == wanted.text
    assert len(chunks) > 2
    assert end["choices"][0]["finish_reason"] == wanted.finish
    assert (usage["choices"], usage["usage"]["prompt_tokens"]) == ([], wanted.prompt_tokens)
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


def test_those_that_wait_are_answered_together_each_as_alone(listener, url, monkeypatch):
    alone = [listener.generate(WAVE[: 4_000 * n], f"Clip {n}?", max_new_tokens=8).text for n in range(1, 7)]
    batches, held, plain = [], threading.Event(), listener.generate

    def generate(audio, prompt, **settings):
        batches.append(len(prompt))
        held.wait(60)
        if len(prompt) == 3 and settings["max_new_tokens"] == 8:
            raise MemoryError("the batch was too large")
        return plain(audio, prompt, **settings)

    def enter(room, job):
        plain_enter(room, job)
        entered.append(job)

    entered, plain_enter = [], Room.enter
    monkeypatch.setattr(Room, "enter", enter)
    monkeypatch.setattr(listener, "generate", generate)
    with ThreadPoolExecutor(7) as pool:
        first = pool.submit(said, url, ask(text("I hold the model up"), max_tokens=1))
        while not batches:
            time.sleep(0.01)
        bodies = [ask(heard(wav(WAVE[: 4_000 * n])), text(f"Clip {n}?"), temperature=0.0) for n in range(1, 7)]
        bodies[3:] = [b | {"max_tokens": 7} for b in bodies[3:]]  # of other settings: not in one batch with these
        found = [pool.submit(said, url, body) for body in bodies]
        until = time.monotonic() + 60
        while len(entered) < 7 and time.monotonic() < until:
            time.sleep(0.01)
        held.set()
        first.result()
        answers = [f.result() for f in found]
    assert answers[:3] == alone[:3]
    for short, whole in zip(answers[3:], alone[3:], strict=True):
        assert whole.startswith(short.rstrip("\ufffd"))
    assert sorted(batches) == [1] * 4 + [3, 3]  # one of the threes failed, then each of it was asked alone


def test_who_goes_away_holds_nobody_up(listener, url, monkeypatch):
    pieces, plain = [], listener.stream

    def stream(*args, **settings):
        for piece in plain(*args, **settings):
            pieces.append(piece)
            yield piece

    monkeypatch.setattr(listener, "stream", stream)
    host = url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(host, timeout=120)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(ask(text("On and on"), stream=True, max_tokens=50_000))
    )
    next(events(connection.getresponse()))
    connection.sock.close()
    assert said(url, ask(text("Hm?"))) == listener.generate(None, "Hm?", max_new_tokens=8).text
    assert len(pieces) < 5_000


def test_an_error_of_the_machine_is_said_and_the_next_request_answered(listener, url, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(listener, "generate", lambda *a, **k: (_ for _ in ()).throw(MemoryError("no memory left")))
        status, told = post(url, ask(text("Hm?")))
    assert (status, told["error"]["type"]) == (500, "server_error")
    assert "no memory left" in told["error"]["message"]
    assert post(url, ask(text("Hm?")))[0] == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "no JSON"), ({}, "messages"), (ask(), "a list of parts"), (ask(text("x"), model="gpt"), "there is 'tiny'"),
        (ask(text("x"), stop=["."]), "stop"), (ask(text("x"), n=2), "n: 2 is not offered"),
        (ask(text("x"), temprature=1), "temprature: is not known"), (ask(text("x"), seed=1.5), "seed"),
        (ask(text("x"), max_tokens=1.5), "max_tokens: 1.5 is no whole number"),
        ({"messages": [{"role": "system", "content": 7}, {"role": "user", "content": "x"}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": []}]}, "messages[1].content"),
        (ask({"type": "input_audio"}), "base64"), (ask(text("x"), temperature="hot"), "temperature"), (ask(text("x"), temperature=-1), "temperature"),
        (ask(text("x"), max_tokens=0), "at least 1"), (ask(text("x"), stream=True, max_tokens=0), "at least 1"),
        (ask(heard(b"RIFF no audio"), text("x")), r"messages[0].content[0] is no audio"),
        (ask({"type": "input_audio", "input_audio": {"data": "%%"}}), "base64"),
        (ask({"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}}), "no address is opened"),
        (ask({"type": "audio_url", "audio_url": {"url": "http://127.0.0.1/x.wav"}}), "no address is opened"),
        (ask({"type": "image_url", "image_url": {"url": "x"}}), "image_url"),
        (ask(text("a"), heard(wav()), text("b")), "not between"),
        (ask(heard(wav()), text("a"), heard(wav())), "not between"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "user is the last"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"},
                       {"role": "user", "content": [heard(wav()), text("x")]}]}, "first turn"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_what_to_write(url, body, words):
    status, told = post(url, body)
    assert (status, told["error"]["type"]) == (400, "invalid_request_error"), told
    assert words in told["error"]["message"]


def test_our_own_judge_is_a_client(listener, url, tmp_path: Path):
    """The client of `make evaluate SET="judge=URL"`: a model of ours may judge."""
    reply = Judge(url, "tiny", tmp_path / "judged.jsonl").reply("What is it?", "a dog", "a dog", "a cat")
    assert isinstance(reply, str)
    assert (tmp_path / "judged.jsonl").read_text().count("\n") == 1
