"""An endpoint on a scripted backend, and bytes to send to it."""

from __future__ import annotations

import dataclasses
import json
import re
import socket

from engine_core.http.limits import HttpLimits
from engine_core.http.server import HttpServer
from engine_core.request import RequestDefaults, SamplingParams
from engine_core.serving.intake import Intake
from engine_core.serving.worker import Worker

MODEL = "fake"


@dataclasses.dataclass
class State:
    settings: RequestDefaults
    engine: object = None
    worker: object = None


class Endpoint:
    def __init__(self, engine, *, settings=None, limits=None, **options):
        self.state = State(settings or RequestDefaults(SamplingParams(max_new_tokens=8)), engine)
        self.state.worker = self.worker = Worker(engine, queue_depth=16)
        self.intake = Intake(self.state)
        self.server = HttpServer(self.intake, port=0, limits=limits or HttpLimits(), **options)
        self.address = ("127.0.0.1", self.server.port)

    def client(self, key="none", **options):
        """OpenAI's own client."""
        import openai

        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=key, max_retries=0, timeout=20, **options)

    def close(self):
        assert self.worker.close()
        assert self.server.close()
        self.intake.close()

    def send(self, data: bytes, *, wait: float = 5.0) -> bytes:
        """What the server says to ``data`` until it closes the connection."""
        with socket.create_connection(self.address, timeout=wait) as sock:
            sock.sendall(data)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def post(self, body, path="/v1/chat/completions", headers="content-type: application/json\r\n"):
        """Status and parsed body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {len(data)}\r\n\r\n"
        return parse(self.send(head.encode() + data))

    def get(self, path):
        answer = self.send(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode()


def parse(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = b"".join(re.findall(rb"(?:^|\r\n)[0-9a-f]+\r\n(.*?)(?=\r\n[0-9a-f]+\r\n)", body, re.DOTALL))
    return int(head.split()[1]), json.loads(body)
