"""The Web UI: from recordings to a voice without a terminal. Every tab is a form over one command line.

    python webui_amharic.py                     # http://127.0.0.1:7860, this machine only
    python webui_amharic.py --share             # a public link, with a user and a password
    python webui_amharic.py --server-name 0.0.0.0 --auth almaz:secret

Programs run detached: they go on when the page is closed or this server ends, and are found again at the next start.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPORARY = "webui-amharic-"
YOUNG = 60  # seconds in which a new folder may not be locked yet


def remove_abandoned_folders(parent: Path) -> None:
    """Uploads of servers that were killed: a server that lives holds a lock on its folder."""
    for folder in parent.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # locked, another user's, or a link
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(handle).st_mtime > YOUNG:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def make_temporary_folder() -> str:
    """Where uploads wait: no other user of this machine can read them, and they go with this process."""
    remove_abandoned_folders(Path(tempfile.gettempdir()))
    folder = tempfile.mkdtemp(prefix=TEMPORARY)
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # until this process ends
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Before Gradio is imported: no telemetry.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1",
               "GRADIO_TEMP_DIR": make_temporary_folder()}

from webui.served_files import route  # noqa: E402
from webui.texts import LANGUAGES, say  # noqa: E402
from webui.whole_page import create_page, launch_options, only_for_hosts  # noqa: E402
from webui.workspace import ROOT, Workspace, is_loopback, load_or_make_credentials  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", action="store_true", help="make a public link (gradio.live)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these (a public page makes its own)")
    parser.add_argument("--server-name", default="127.0.0.1", metavar="H", help="address to listen on (127.0.0.1)")
    parser.add_argument("--server-port", type=int, default=7860, metavar="P", help="port to listen on (7860)")
    parser.add_argument("--workspace", type=Path, default=ROOT, metavar="DIR",
                        help="the folder that the page may read and write (the repository)")
    args = parser.parse_args(argv)
    user, colon, password = (args.auth or "").partition(":")
    if args.auth is not None and not (user and colon and password):
        parser.error("--auth: USER:PASSWORD, such as almaz:secret")
    args.credentials = (user, password) if args.auth else None
    return args


def tunnel(port: int) -> str:
    return f"ssh -L {port}:127.0.0.1:{port} USER@HOST"


def serve(args: argparse.Namespace, workspace: Workspace) -> None:
    """Serves the page until it is stopped. Raises: OSError when the port is taken."""
    credentials, made = args.credentials, False
    if credentials is None and (args.share or not is_loopback(args.server_name)):
        credentials, made = load_or_make_credentials(workspace), True
    demo, page = create_page(workspace)
    os.chdir(workspace.root)  # Gradio lets handlers show files of the working directory
    options: dict[str, Any] = {"server_name": args.server_name, "server_port": args.server_port, "share": args.share,
                               "auth": credentials, "prevent_thread_lock": True, "quiet": True}
    options["app_kwargs"] = {"routes": [route(workspace, page.secret), page.route()],
                             **(only_for_hosts(args.server_name) if credentials is None else {})}
    _, local_url, share_url = demo.launch(**options, **launch_options(workspace))
    print(f"[Info] Page: {local_url}", flush=True)
    if made:
        print(f"[Info] User: {credentials[0]}   Password: {credentials[1]}   (kept in {workspace.private}/auth.json)",
              flush=True)
    if share_url:
        print(f"[Info] Public link: {share_url}", flush=True)
    elif args.share:
        command = tunnel(args.server_port)
        print(f"[Info] No share link could be made. On your own computer: {command}, then open "
              f"http://127.0.0.1:{args.server_port}", flush=True)
        page.banner = {language: f"⚠ {say('share_failed', language)} `{command}`, http://127.0.0.1:{args.server_port}"
                       for language in LANGUAGES}
    print("[Info] Ready", flush=True)
    demo.block_thread()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(args, Workspace.open(args.workspace))
    except OSError as error:
        print(f"[Error] {error}. Choose another --server-port, --server-name or --workspace", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
