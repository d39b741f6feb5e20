"""A stand-in for the Hub, as much as pushing a folder needs; every file is taken inline, in the commit itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from http_servers import Server, response_of


@dataclass
class HubStub(Server):
    """`committed` is what was pushed. With `refuse` nobody may do anything."""

    committed: dict[str, bytes] = field(default_factory=dict)
    refuse: bool = False
    repository: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        rows = [json.loads(line) for line in (await request.read()).splitlines()]
        if request.path == "/api/repos/create":
            self.repository = "{organization}/{name}".format_map(rows[0])
        reply: dict[str, Any] = {"url": f"{self.url}/{self.repository}"}
        if "/preupload/" in request.path:
            names = [file["path"] for file in rows[0]["files"]]
            reply["files"] = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
        elif "/commit/" in request.path:
            reply |= {"commitUrl": f"{reply['url']}/commit/1", "commitOid": "1"}
            files = [row["value"] for row in rows if row["key"] == "file"]
            self.committed |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        return response_of(401, {"error": "Invalid username or password."}) if self.refuse else response_of(200, reply)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """The Hub of this process and of those that it starts."""
    with HubStub().running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_stub"}.items():
            monkeypatch.setenv(name, value)
        yield hub
