"""Somebody at the page, in a real browser, and the server that they visit."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import playwright.sync_api
from conftest import ROOT

from webui import jobs, run_queue
from webui.workspace import Workspace

PICTURES = ROOT / "build" / "screenshots"
SINGLE_STEPS = ("Corpus", "Tokenizer", "Preprocess")  # behind folds of Prepare
FOLDS = "More settings|Rarely needed|synthetic voice|Demo corpus|single step|Export|Hear a training|Does it say"
RATE = 22050
PATIENCE = 60_000  # milliseconds; starting a program imports PyTorch, slowly on a busy machine


def until(condition: Callable[[], Any], seconds: float = PATIENCE / 1000) -> Any:
    """Waits until the condition holds; returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


class Server:
    """webui_amharic.py as its users start it."""

    def __init__(self, workspace: Path, *args: str, **environment: str) -> None:
        self.workspace, self.args, self.environment = workspace, args, environment
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "webui_amharic.py"), "--workspace", str(self.workspace),
                   "--server-port", str(self.port), *self.args]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        env={**os.environ, **self.environment})
        assert self.process.stdout is not None
        self.printed = ""
        for line in self.process.stdout:
            self.printed += line
            if line.startswith("[Info] Ready"):
                return
        raise AssertionError(f"the server ended:\n{self.printed}")

    def end(self, signum: int = signal.SIGTERM) -> None:
        self.process.send_signal(signum)
        self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def end_all_jobs(workspace: Path) -> None:
    for job in jobs.list_jobs(Workspace.open(workspace)):
        if job.in_queue:
            run_queue.take_out(Workspace.open(workspace), job.id)
        jobs.kill_job(job)


def tone(seed: int) -> np.ndarray:
    """A made-up voice, two seconds, different for every seed."""
    at = np.arange(2 * RATE) / RATE
    rng = np.random.default_rng(seed)
    pitch = 2 * np.pi * np.cumsum(120 * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(1, 4) * at))) / RATE
    return (0.1 * sum(rng.uniform(0.1, 1) * np.sin(k * pitch) / k for k in range(1, 12))).astype(np.float32)


class Visitor:
    """Somebody at the page, with a browser profile of their own."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 1000})
        self.context.set_default_timeout(PATIENCE)
        self.server, self.page, self.elsewhere = server, self.context.new_page(), []
        self.page.on("request", self.note)
        self.page.goto(server.url)
        self.sees("#pipeline", "Next|Every step")

    def note(self, request: Any) -> None:
        if not request.url.startswith((self.server.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def open(self, tab: str) -> None:
        step = "Prepare" if tab in SINGLE_STEPS else tab
        self.page.get_by_role("tab", name=re.compile(rf"\d {step}")).first.click()
        if tab in SINGLE_STEPS:
            self.unfold(f"{SINGLE_STEPS.index(tab) + 3} {tab}: single step")

    def unfold(self, name: str) -> None:
        fold = self.page.get_by_role("button", name=name).first
        fold.wait_for()
        if "open" not in (fold.get_attribute("class") or "").split():
            fold.click()

    def box(self, element: str) -> Any:
        return self.page.locator(f"#{element} textarea, #{element} input").first

    def fill(self, kind: str, **values: object) -> None:
        for name, value in values.items():
            self.box(f"{kind}-{name}").fill(str(value))

    def click(self, element: str) -> None:
        self.page.locator(f"#{element}").click()

    def sees(self, selector: str, text: str) -> str:
        """Waits until the element says so; returns all that it says."""
        place = self.page.locator(f"{selector}:visible").filter(has_text=re.compile(text, re.DOTALL))
        try:
            place.first.wait_for(timeout=PATIENCE)
        except playwright.sync_api.TimeoutError as error:
            self.page.screenshot(path=PICTURES / "failed.png")
            said = self.page.locator(selector).all_inner_texts()
            raise AssertionError(f"{self.page.url}: {selector} never said {text!r}, but {said}") from error
        return place.first.inner_text()

    def reads(self, element: str, pattern: str) -> str:
        """Waits until the box holds it; returns its value."""
        return until(lambda: re.search(pattern, value := self.box(element).input_value()) and value)

    def command(self, kind: str, *parts: str) -> str:
        """Waits until the command preview has all the parts."""
        return until(lambda: all(part in (shown := self.box(f"{kind}-command").input_value()) for part in parts)
                     and shown)

    def problem(self, element: str) -> str:
        """What is said beside a box that has a problem."""
        return self.page.locator(f"#{element}.problem").first.inner_text()

    def set_resume(self, wanted: bool) -> None:
        self.page.get_by_role("checkbox", name="Resume from checkpoint").set_checked(wanted)

    def more_settings(self) -> None:
        """Opens the folds that can be seen, and those within."""
        while self.page.evaluate(f"""() => {{
            const shut = [...document.querySelectorAll("button.label-wrap:not(.open)")].filter(
                fold => fold.offsetParent && /{FOLDS}/.test(fold.innerText));
            shut.forEach(fold => fold.click());
            return new Promise(done => setTimeout(() => done(shut.length), 100));
        }}"""):
            pass

    def points(self, element: str) -> int:
        """Points of a plot's curves."""
        return self.page.locator(f"#{element} svg .mark-symbol path").count()

    def lines(self, element: str) -> int:
        """Curves of a plot that can be seen: of a colour, with points."""
        return self.page.locator(f"#{element} svg .mark-line path[stroke^='#'][d*='L']").count()

    def leave(self) -> None:
        self.context.close()
