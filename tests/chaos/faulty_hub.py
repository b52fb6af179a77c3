"""The loopback Hub with a bad line: answers fail, break off and stall at random, reproducibly."""

import random
import time
from collections import Counter

from hub_server import Handler, HubServer, Repo


KINDS = ("500", "503", "429", "reset", "cut", "stall")


class FaultyHub(HubServer):
    """Fails a share of the requests for files.

    Attributes:
        rate: share of the GET requests for files that fail.
        stall: seconds that a stalling answer takes before its first byte.
        injected: kind -> how many.
        served: file -> bytes sent.
    """

    def __init__(self, rate: float = 0.0, seed: int = 0, stall: float = 0.5):
        super().__init__()
        self.RequestHandlerClass = FaultyHandler
        self.rate, self.stall = rate, stall
        self.injected: Counter[str] = Counter()
        self.asked = 0
        self.served: Counter[str] = Counter()
        self._dice = random.Random(seed)

    def add_dataset(self, name: str, files: dict[str, bytes]) -> None:
        repo = Repo()
        repo.commit("main").files.update(files)
        self.repos["datasets", name] = repo

    def draw(self) -> str | None:
        """The fault of this request, if it is to have one."""
        with self.lock:
            self.asked += 1
            kind = self._dice.choice(KINDS) if self._dice.random() < self.rate else None
            if kind:
                self.injected[kind] += 1
            return kind


class FaultyHandler(Handler):
    server: FaultyHub

    def _serve(self, method: str) -> None:
        self.file = self.path.partition("/resolve/")[2]
        self.fault = self.server.draw() if method == "GET" and self.file else None
        super()._serve(method)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        fault, self.fault = self.fault, None
        if fault is None or status >= 300:
            if status < 300 and self.command == "GET" and self.file:
                self.server.served[self.file] += len(body)
            return super()._send(status, body, headers)
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
        elif fault == "cut":
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "stall":
            time.sleep(self.server.stall)
            super()._send(status, body, headers)
        else:
            super()._send(int(fault), b"", {"Retry-After": "0"} if fault == "429" else {})
