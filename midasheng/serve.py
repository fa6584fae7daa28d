"""An OpenAI-compatible server for one machine: /v1/chat/completions over a Listener, with audio in the messages.

One thread owns the model. Requests that wait with the same settings are answered as one batch, which gives the answers
of one by one. FastAPI and uvicorn carry it. Audio comes in the request (`input_audio`, or `audio_url` with a data: URL,
as vLLM takes it): no path and no address of a request is ever opened.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

from midasheng.config import UserError
from midasheng.inference import Answer, Listener, waveform

BATCH = 16
# of a request: its name for each setting of Listener.generate, and the kind
SETTINGS: dict[str, tuple[str, type]] = {
    "temperature": ("temperature", float), "top_p": ("top_p", float), "top_k": ("top_k", int), "seed": ("seed", int),
    "max_tokens": ("max_new_tokens", int), "max_completion_tokens": ("max_new_tokens", int),
}  # fmt: skip
# what would change an answer and is not done here, with the value that changes nothing; any other is refused
NEUTRAL: dict[str, Any] = {
    "n": 1, "stop": [], "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
    "logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "modalities": ["text"], "ignore_eos": False,
}  # fmt: skip
READ = {*SETTINGS, *NEUTRAL, "model", "messages", "stream", "stream_options"}
# accepted and not read: nothing of an answer hangs on them
NO_MATTER = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "tool_choice", "top_logprobs"}


@dataclass(frozen=True)
class Asked:
    """A request as Listener.generate takes it."""

    clips: list[NDArray[np.float32]]
    prompt: str
    settings: dict[str, Any]  # system, text_first, history and those of sampling


@dataclass(eq=False)
class Job:
    """A request that waits for the model, and where its pieces and its end go."""

    asked: Asked
    stream: bool
    loop: asyncio.AbstractEventLoop
    told: asyncio.Queue[str | Answer | Exception] = field(default_factory=asyncio.Queue)
    gone: bool = False  # nobody reads its stream any more
    alone: bool = False  # not in a batch

    def __post_init__(self) -> None:
        self.alone = self.stream

    def tell(self, what: str | Answer | Exception) -> None:
        """From the model's thread."""
        self.loop.call_soon_threadsafe(self.told.put_nowait, what)


# -- a request --------------------------------------------------------------------------------------------------------


def asked(body: Any) -> Asked:
    """What a request asks. Raises UserError for what cannot be answered, and for what would be left out."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise UserError("messages: write a list of {role, content}")
    for name, value in body.items():
        if name not in READ | NO_MATTER:
            raise UserError(f"{name}: is not known here; there are {', '.join(sorted(READ))}")
        if name in NEUTRAL and value is not None and value != NEUTRAL[name] and value not in ([], {}):
            raise UserError(f"{name}: {json.dumps(value)} is not offered; leave it out")
    settings: dict[str, Any] = {"temperature": 0.0}  # not OpenAI's 1: what is measured and what chat says is greedy
    for name, (ours, kind) in SETTINGS.items():
        if (value := body.get(name)) is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
                raise UserError(f"{name}: {json.dumps(value)} is no {'number' if kind is float else 'whole number'}")
            settings[ours] = kind(value)
    messages = body["messages"]
    roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
    start = int(roles[0] in ("system", "developer"))
    if start:
        settings["system"] = _words(messages[0], 0)
    roles = roles[start:]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise UserError(f"messages: their roles are {roles}; user and assistant take turns, user is the last")
    prompt, clips, settings["text_first"] = _turn(messages[start], start)
    said = [prompt, *(_words(messages[n], n) for n in range(start + 1, len(messages)))]
    settings["history"] = tuple(zip(said[:-1:2], said[1::2], strict=True))
    return Asked(clips, said[-1], settings)


def _words(message: dict[str, Any], number: int) -> str:
    text, clips, _ = _turn(message, number)
    if clips:
        raise UserError(f"messages[{number}]: clips stand in a conversation's first turn of the user alone")
    return text


def _turn(message: dict[str, Any], number: int) -> tuple[str, list[NDArray[np.float32]], bool]:
    """(text, clips, whether the text stands before them) of a message."""
    content, where = message.get("content"), f"messages[{number}].content"
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{where}: write a string, or a list of parts with a type")
    texts, clips, order = [], [], ""
    for place, part in enumerate(parts):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            order += "t"
        elif part.get("type") in ("input_audio", "audio_url"):
            clips.append(waveform(_bytes(part, f"{where}[{place}]"), f"{where}[{place}]"))
            order += "a"
        else:
            raise UserError(f"{where}[{place}]: {part.get('type')!r}; write text, input_audio or audio_url")
    if len([*itertools.groupby(order)]) > 2:
        raise UserError(f"{where}: clips stand before the text or behind it, not between two of it")
    return "\n".join(texts), clips, order.startswith("t") and "a" in order


def _bytes(part: dict[str, Any], where: str) -> bytes:
    kind = str(part["type"])
    held = part.get(kind)
    data = held.get("data" if kind == "input_audio" else "url") if isinstance(held, dict) else None
    if kind == "audio_url" and isinstance(data, str):
        head, _, data = data.partition(",")
        if not head.startswith("data:") or not head.endswith(";base64"):
            raise UserError(f"{where}: no address is opened here; write data:audio/wav;base64,... into the url")
    try:
        return base64.b64decode(data or "%", validate=True)  # no base64: absent and empty are refused alike
    except (TypeError, ValueError):
        raise UserError(f"{where}: write the audio file's bytes in base64") from None


# -- the model's thread -----------------------------------------------------------------------------------------------


class Room:
    """The model and those who wait for it."""

    def __init__(self, listener: Listener, batch: int = BATCH) -> None:
        self.listener, self.batch = listener, batch
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def enter(self, job: Job) -> None:
        """Wait for the model."""
        with self.changed:
            self.waiting.append(job)
            self.changed.notify()

    def _return(self, jobs: Sequence[Job]) -> None:
        """Those that could not be answered together wait again, each for itself."""
        with self.changed:
            for job in reversed(jobs):
                job.alone = True
                self.waiting.appendleft(job)

    def _next(self) -> list[Job]:
        """The one that has waited longest, and those who can be answered with it."""
        with self.changed:
            while not self.waiting:
                self.changed.wait()
            jobs = [first := self.waiting.popleft()]
            for other in list(self.waiting) if not first.alone else []:
                if len(jobs) < self.batch and not other.alone and other.asked.settings == first.asked.settings:
                    jobs.append(other)
                    self.waiting.remove(other)
        return jobs

    def _work(self) -> None:
        while True:
            jobs = self._next()
            try:
                if jobs[0].stream:
                    self._stream(jobs[0])
                else:
                    self._together(jobs)
            except Exception as error:  # whatever it is, others wait: this thread must go on, and each must hear
                if len(jobs) == 1:
                    if not isinstance(error, UserError):
                        traceback.print_exception(error)  # the client gets one line of it
                    jobs[0].tell(error)
                else:  # too many, or one that spoils it for all
                    self._return(jobs)

    def _together(self, jobs: Sequence[Job]) -> None:
        found = self.listener.generate(
            [job.asked.clips for job in jobs], [job.asked.prompt for job in jobs], batch_size=len(jobs),
            **jobs[0].asked.settings,
        )  # fmt: skip
        for job, answer in zip(jobs, found, strict=True):
            job.tell(answer)

    def _stream(self, job: Job) -> None:
        pieces = self.listener.stream(job.asked.clips, job.asked.prompt, **job.asked.settings)
        while not job.gone:
            try:
                job.tell(next(pieces))
            except StopIteration as end:
                job.tell(end.value)
                return


# -- over HTTP --------------------------------------------------------------------------------------------------------


def refusal(error: Exception) -> JSONResponse:
    """An error in OpenAI's form: 400 for the request's own, 500 for ours."""
    own = isinstance(error, UserError)
    kind, status = ("invalid_request_error", 400) if own else ("server_error", 500)
    text = str(error) if own else f"{type(error).__name__}: {error}"
    return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": None}}, status)


def app(listener: Listener, name: str, batch: int = BATCH) -> FastAPI:
    """The server, where the model is called `name`; at most `batch` requests are answered together."""
    server, room, born = FastAPI(title="midasheng"), Room(listener, batch), int(time.time())

    @server.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @server.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": born, "owned_by": "midasheng"}]}

    @server.post("/v1/chat/completions", response_model=None)
    async def completions(request: Request) -> JSONResponse | StreamingResponse:
        try:
            try:
                body = json.loads(await request.body())
            except ValueError as error:
                raise UserError(f"the request is no JSON: {error}") from None
            found = await run_in_threadpool(asked, body)
            if body.get("model") not in (None, name):
                raise UserError(f"model: {body['model']!r} is not served; there is {name!r}")
        except UserError as error:
            return refusal(error)
        job = Job(found, bool(body.get("stream")), asyncio.get_running_loop())
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        room.enter(job)
        if job.stream:
            first = await job.told.get()  # what is wrong is said with its status, before a stream begins
            if isinstance(first, Exception):
                return refusal(first)
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_events(job, first, head, usage), media_type="text/event-stream")
        answer = await job.told.get()
        if not isinstance(answer, Answer):
            assert isinstance(answer, Exception)
            return refusal(answer)
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": _usage(answer)})

    return server


async def _events(job: Job, first: str | Answer, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """A stream's events; the model stops when nobody reads them any more."""

    def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        body = head | {"object": "chat.completion.chunk", "choices": [choice]} | more
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        what: str | Answer | Exception = first
        while isinstance(what, str):
            yield event({"content": what})
            what = await job.told.get()
        if isinstance(what, Exception):
            yield f"data: {json.dumps({'error': {'message': str(what), 'type': 'server_error'}})}\n\n"
            return
        yield event({}, what.finish)
        if usage:
            yield event({}, choices=[], usage=_usage(what))
        yield "data: [DONE]\n\n"
    finally:
        job.gone = True


def _usage(answer: Answer) -> dict[str, int]:
    prompt, own = answer.prompt_tokens, answer.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": own, "total_tokens": prompt + own}
