"""A stand-in for the Hub, as much as pushing a folder needs; run what pushes in a process of its own (HF_ENDPOINT)."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest


class HubStub(BaseHTTPRequestHandler):
    """As much of the Hub as pushing a folder talks to; every file is taken inline, in the commit itself."""

    committed: dict[str, bytes]
    paths: list[str]
    refuse: bool
    repository = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.paths.append(self.path)
        if self.path == "/api/repos/create":
            type(self).repository = "{organization}/{name}".format_map(json.loads(body))
        reply: dict[str, Any] = {"url": f"http://{self.headers['Host']}/{self.repository}"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            reply["files"] = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
        elif "/commit/" in self.path:
            reply |= {"commitUrl": f"{reply['url']}/commit/1", "commitOid": "1"}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        content = json.dumps({"error": "Invalid username or password."} if self.refuse else reply).encode()
        self.send_response(401 if self.refuse else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    HubStub.committed, HubStub.paths, HubStub.refuse = {}, [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubStub)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
