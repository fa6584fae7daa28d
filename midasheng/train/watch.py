"""The report page on this machine's own address, following running stages."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from midasheng.config import UserError
from midasheng.train.report import Report, as_json, page

LOOPBACK = "127.0.0.1"
PORT, TRIED = 8060, 20
POLL_S = 3.0  # seconds between two questions of the page


class Watched:
    """What is known of the runs, read anew when somebody asks and a file has changed."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.report, self.lock = Report(folder, names), threading.Lock()
        self.known: dict[str, Any] = {}
        self.clips: dict[str, str] = {}
        self.data()

    def data(self) -> dict[str, Any]:
        """The page's data with its version. Raises UserError for a name that is no run."""
        with self.lock:
            if self.report.follow() or not self.known:
                found = self.report.data()
                self.clips = self.report.clips()
                version = hashlib.sha256(as_json(found["runs"]).encode()).hexdigest()[:16]
                self.known = found | {"version": version, "poll_s": POLL_S}
            return self.known


class Handler(BaseHTTPRequestHandler):
    """/ is the page, /data.json?known=VERSION what is new (204: nothing), /clips.json the audio."""

    server: Server

    def do_GET(self) -> None:
        """Answer one question."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in (LOOPBACK, "localhost"):  # another site's name that was made to point here
            self.send_error(403)
            return
        asked = urlsplit(self.path)
        watched = self.server.watched
        if asked.path == "/":
            data = watched.data()
            self._send("text/html; charset=utf-8", page(data, watched.clips, live=True))
        elif asked.path == "/data.json":
            data = watched.data()
            if parse_qs(asked.query).get("known") == [data["version"]]:
                self.send_response(204)
                self.end_headers()
            else:
                self._send("application/json", as_json(data))
        elif asked.path == "/clips.json":
            self._send("application/json", as_json(watched.clips))
        else:
            self.send_error(404)

    def _send(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line every few seconds tells nobody anything."""


class Server(ThreadingHTTPServer):
    """Serves one Watched on the loopback address; `port` 0: any free one."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched = watched
        super().__init__((LOOPBACK, port), Handler)

    @cached_property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/"


def open_server(folder: Path, names: Sequence[str], port: int | None) -> Server:
    """Listen on `port`, or where none is given on the next free one from 8060 on. Raises UserError."""
    watched = Watched(folder, names)
    for tried in [port] if port is not None else [*range(PORT, PORT + TRIED), 0]:
        try:
            return Server(watched, tried)
        except OSError as error:
            if port is not None:
                raise UserError(f"port {port} cannot be listened on ({error}); say PORT=0 for any free one") from None
    raise AssertionError("port 0 is always free")
