"""A real HTTP server of a folder, with byte ranges, a listing, and whatever goes wrong with servers."""

import threading
import time
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WHOLE = "whole"  # it knows no ranges: 200 and the whole file
TORN = "torn"  # fewer bytes than Content-Length says
SHORT = "short"  # fewer bytes than asked for, and says so: 200, as a proxy does that has lost the rest
SILENT = "silent"  # accepts and says nothing
Fault = int | str  # a status, or one of the above


class Server:
    """`faults` are met by the next requests, one each, then `always` by all; `delay_s` stands before every answer.

    Only requests of `faulty` methods meet them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.faulty = ("GET", "HEAD")
        self.delay_s = 0.0
        self.asked: list[tuple[str, str, str]] = []  # (method, path, range)
        self.most_at_once, self._now = 0, 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(root))  # type: ignore[arg-type]

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    server.answer(self, body=True)

            def do_HEAD(self) -> None:
                with suppress(ConnectionError):
                    server.answer(self, body=False)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def gets(self) -> int:
        """GET requests so far."""
        return sum(method == "GET" for method, _, _ in self.asked)

    def answer(self, to: SimpleHTTPRequestHandler, *, body: bool) -> None:
        with self._lock:
            self.asked.append((to.command, to.path, to.headers.get("Range", "")))
            fault = None
            if to.command in self.faulty:
                fault = self.faults.pop(0) if self.faults else self.always
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.delay_s)
        try:
            self._answer(to, fault, body=body)
        finally:
            with self._lock:
                self._now -= 1

    def _answer(self, to: SimpleHTTPRequestHandler, fault: Fault | None, *, body: bool) -> None:
        path = Path(to.translate_path(to.path))
        if fault == SILENT:
            self._closing.wait(60)
            return
        if isinstance(fault, int):
            to.send_error(fault)
            return
        if path.is_dir():
            SimpleHTTPRequestHandler.do_GET(to) if body else SimpleHTTPRequestHandler.do_HEAD(to)
            return
        if not path.is_file():
            to.send_error(404)
            return
        data, status = path.read_bytes(), 200
        asked = to.headers.get("Range", "")
        if asked and fault != WHOLE:
            first, last = asked.removeprefix("bytes=").split("-")
            data, status, whole = data[int(first) : int(last) + 1], 206, len(data)
            if not data:
                to.send_error(416)
                return
        if fault == SHORT:
            data, status = data[: len(data) // 2], 200
        to.send_response(status)
        to.send_header("Content-Length", str(len(data)))
        to.send_header("Last-Modified", to.date_time_string(path.stat().st_mtime))
        to.send_header("Accept-Ranges", "bytes")
        if status == 206:
            to.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{whole}")
        to.end_headers()
        if body:
            to.wfile.write(data[: len(data) // 2] if fault == TORN else data)
