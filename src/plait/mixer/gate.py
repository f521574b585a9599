"""Who may see the page: whoever has its address, with the token in it; and what the page may ask for: nothing elsewhere.

Plain ASGI, independent of what is behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from hashlib import sha256
from hmac import compare_digest
from typing import Any, TypeAlias
from urllib.parse import parse_qs

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN = "token"
_OPEN = ("/gradio_api/startup-events",)  # that the server asks itself for, and that tells nothing
_HEADERS = {
    # whatever a library would fetch from elsewhere is not fetched
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_REFUSAL = b"""<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>plait mix</title>
<body style="font: 1rem/1.5 system-ui, sans-serif; max-width: 30rem; margin: 15vh auto; padding: 0 1rem">
<h1 style="font-size: 1.2rem">This mixer asks for its token</h1>
<p>The command <code>plait mix</code> has printed an address with a token. Open that, or give the token here; a setting in this
address stays.</p>
<form onsubmit="const q = new URLSearchParams(location.search); q.set('token', this.token.value); location.search = q;
return false"><input name="token" autocomplete="off" aria-label="token"> <button>Open</button></form>"""


class Gate:
    """Lets requests with the token through, in the address or, from then on, in a cookie.

    Args:
        app: what is behind it.
        token: that opens it.
    """

    def __init__(self, app: App, token: str) -> None:
        self._app, self._token = app, token
        self._cookie = (
            f"plait_mix_{sha256(token.encode()).hexdigest()[:8]}"  # mixers on several ports share a browser's cookies
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        by_address = any(self._opens(text) for text in query.get(TOKEN, ()))
        if not (by_address or self._opens(_cookie(scope, self._cookie)) or scope["path"] in _OPEN):
            await _refuse(scope, send)
            return
        more = dict(_HEADERS)
        if by_address:
            more["set-cookie"] = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_raw(more)]
            await send(message)

        await self._app(scope, receive, sent)

    def _opens(self, text: str) -> bool:
        return compare_digest(text.encode(), self._token.encode())


def _cookie(scope: Scope, wanted: str) -> str:
    """Return a cookie's value; other servers of this host may have set some that `http.cookies` does not read."""
    for name, value in scope.get("headers", ()):
        if name == b"cookie":
            header: str = value.decode("latin-1")
            for part in header.split(";"):
                key, _, text = part.strip().partition("=")
                if key == wanted:
                    return text
    return ""


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 4401})
        return
    headers = _raw({"content-type": "text/html; charset=utf-8", "cache-control": "no-store"})
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSAL})
