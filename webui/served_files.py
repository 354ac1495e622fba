"""Files of the workspace that the page offers to hear or to download, by links that only the page can make.

Gradio's own components copy a file before they serve it, which a checkpoint of gigabytes does not bear. A link here
carries a signature of its path, so that no other path can be asked for, and needs the page's login where there is one;
what it leads to is judged anew each time.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from webui.workspace import Refused, Workspace

PREFIX = "made"  # relative links work below any prefix of a proxy
SHOWN = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".oga": "audio/ogg", ".opus": "audio/ogg",
         ".mp3": "audio/mpeg", ".png": "image/png"}


def signature(secret: str, name: str) -> str:
    return hmac.new(secret.encode(), name.encode(), hashlib.sha256).hexdigest()[:40]


def link_to(workspace: Workspace, secret: str, path: Path) -> str:
    """The link, relative to the page; "" for what the page must not offer. It changes with the file's content."""
    try:
        name = workspace.show(workspace.inside(str(path), must_exist=True))
        changed = path.stat().st_mtime_ns
    except (Refused, OSError):
        return ""
    return f"{PREFIX}/{signature(secret, name)}/{quote(name)}?{changed}"


def logged_in(request: Request) -> bool:
    """As Gradio's own routes ask it: the cookie of a login, where the page has a password."""
    app: Any = request.app
    if getattr(app, "auth", None) is None:
        return True
    cookies = [request.cookies.get(f"access-token-{kind}{app.cookie_id}") for kind in ("", "unsecure-")]
    return any(cookie and app.tokens.get(cookie) is not None for cookie in cookies)


def route(workspace: Workspace, secret: str) -> Route:
    """What answers to link_to(): sounds and pictures are shown, all else is downloaded and never shown as a page."""

    def serve(request: Request) -> Response:
        if not logged_in(request):
            return PlainTextResponse("log in first", 401)
        name = request.path_params["name"]
        if not hmac.compare_digest(request.path_params["mark"].encode(), signature(secret, name).encode()):
            return PlainTextResponse("no such link", 404)
        try:
            path = workspace.inside(name, must_exist=True)
        except Refused:
            return PlainTextResponse("no such file", 404)
        if not path.is_file():
            return PlainTextResponse("no such file", 404)
        kind = SHOWN.get(path.suffix.lower())
        return FileResponse(path, media_type=kind or "application/octet-stream", filename=path.name,
                            content_disposition_type="inline" if kind else "attachment",
                            headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private"})

    return Route(f"/{PREFIX}/{{mark}}/{{name:path}}", serve)
