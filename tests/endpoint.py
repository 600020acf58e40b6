"""An OpenAI-compatible endpoint within the test's process: what it says is scripted."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "scripted"
Say = Callable[[str, int], Any]  # of the text asked and the number of the request


class Served:
    """What a server was asked, and how it answers."""

    def __init__(self, say: Say, secret: str | None) -> None:
        self.say, self.secret, self.lock = say, secret, threading.Lock()
        self.asked = list[dict[str, Any]]()
        self.url = ""

    @property
    def texts(self) -> list[str]:
        return [str(one["messages"][0]["content"]) for one in self.asked]


class Status(int):
    """An answer that is no completion; `wait` is its Retry-After."""

    wait = ""


class Late(float):
    """No answer before so many seconds."""


class Raw(str):
    """A body as it is, of status 200; cut off behind it."""


@contextlib.contextmanager
def serving(say: Say, secret: str | None = None) -> Iterator[Served]:
    """`say(text, number)` gives a text, None, a Status, Late, Raw, or a message of its own."""
    served = Served(say, secret)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def allowed(self) -> bool:
            given = self.headers.get("Authorization", "")
            if secret is None or given == f"Bearer {secret}":
                return True
            self.reply(401, {"error": {"message": f"bad key {given}"}})
            return False

        def reply(self, status: int, value: Any, wait: str = "") -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if wait:
                self.send_header("Retry-After", wait)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.allowed():
                models = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
                self.reply(200, models if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            with served.lock:
                served.asked.append(asked)
                number = len(served.asked)
            said = served.say(str(asked["messages"][0]["content"]), number)
            if isinstance(said, Late):
                time.sleep(said)
                return
            if isinstance(said, Status):
                self.reply(int(said), {"error": {"message": f"status {said}"}}, said.wait)
            elif isinstance(said, Raw):
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said) + 100))
                self.end_headers()
                self.wfile.write(said.encode())
            else:
                message = said if isinstance(said, dict) else {"content": said}
                choice = {"index": 0, "message": {"role": "assistant", **message}}
                usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                choice["finish_reason"] = "stop"
                whole = {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL}
                self.reply(200, {**whole, "choices": [choice], "usage": usage})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
