"""A retriever in this process, shared by the tests of its server and its client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from zerosearch.engines.retriever_server import PassageIndex, RetrieverServer, listen, web_server


@asynccontextmanager
async def serving(server: RetrieverServer) -> AsyncIterator[str]:
    """Serve on a free port of this machine; yield the address of /retrieve."""
    listener, web = listen("127.0.0.1", 0), web_server(server)
    task = asyncio.create_task(web.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve"
    finally:
        web.should_exit = True
        await task


def asked(index: PassageIndex, *bodies: Any, path: str = "/retrieve", topk: int = 3) -> list[tuple[int, Any]]:
    """POST each body (bytes as they are, anything else as JSON) to a server; return status and JSON of each reply."""

    async def ask() -> list[tuple[int, Any]]:
        async with serving(RetrieverServer(index, topk)) as address, aiohttp.ClientSession() as session:
            replies = []
            for body in bodies:
                content = {"data": body} if isinstance(body, bytes) else {"json": body}
                async with session.post(address.replace("/retrieve", path), **content) as response:
                    replies.append((response.status, await response.json()))
            return replies

    return asyncio.run(ask())
