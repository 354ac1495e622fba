"""Tab 6 in a real browser: a run is started and stopped from the bar, goes on by a click after it was stopped, and its
history is shown, cloned, compared and deleted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import test_webui_browser
from test_webui_browser import fill_training
from visitor import PICTURES, Server, Visitor, until

from webui import jobs
from webui.texts import TEXTS
from webui.workspace import Workspace

pytestmark = test_webui_browser.pytestmark
workspace, server = test_webui_browser.workspace, test_webui_browser.server
visitor, no_jobs_left = test_webui_browser.visitor, test_webui_browser.no_jobs_left


def act(visitor: Visitor, run: str, what: str) -> None:
    row = visitor.page.locator("#runs-table tr").filter(has=visitor.page.locator(f"td.name:text-is('{run}')"))
    row.locator(f"[data-act={what}]").click()


def in_sight(visitor: Visitor, element: str) -> bool:
    return visitor.page.evaluate("""id => {
        const box = document.getElementById(id).getBoundingClientRect();
        return box.top >= 0 && box.bottom <= innerHeight + 1;
    }""", element)


def test_a_run_is_started_from_the_bar_goes_on_by_a_click_and_its_history_is_kept(visitor: Visitor, workspace: Path,
                                                                                  server: Server):
    shutil.copytree(workspace / "voice", workspace / "spare")
    fill_training(visitor, "history")
    visitor.sees("#training-no-curves", "curves begin with the first line")
    assert visitor.page.locator("#training-mel_loss svg").count() == 0
    for where in ("0", "document.body.scrollHeight / 3"):
        visitor.page.evaluate(f"scrollTo(0, {where})")
        until(lambda: in_sight(visitor, "training-start"))
    visitor.page.get_by_role("button", name="Start Training").click()
    visitor.sees(".notice", "Started at")
    visitor.sees("#training-status.state-running", "running")
    visitor.page.evaluate("scrollTo(0, 0)")
    until(lambda: in_sight(visitor, "training-stop"))
    until(lambda: visitor.points("training-mel_loss") > 5)
    visitor.click("training-stop")
    visitor.sees("#training-status.state-stopped", "can be resumed")

    # Smoothing: the raw line stays behind.
    visitor.page.locator("#training-smoothing input[type=number]").fill("0.9")
    visitor.page.keyboard.press("Tab")
    until(lambda: visitor.lines("training-mel_loss") == 3)

    visitor.click("training-go-on")
    visitor.sees("#training-status.state-running", "running")
    visitor.reads("training-log", r"\[Train\] ")
    job = jobs.list_jobs(Workspace.open(workspace))[0]
    assert job.argv[-2:] == ["--resume", "auto"]
    jobs.kill_job(job)
    visitor.sees("#training-status.state-killed", "SIGKILL")
    visitor.sees("#training-go-on", "Go on")
    visitor.sees("#runs-table tr", r"history.*killed.*\d\.\d{4} at step \d+")

    act(visitor, "history", "show")
    log = visitor.reads("runs-log", "resume auto")
    assert len(re.findall("^── .*train_gpt_v2", log, re.MULTILINE)) == 2 and "Successfully resumed" in log
    visitor.sees("#runs-settings", "Steps between validations.*5")
    act(visitor, "voice", "compare")
    until(lambda: visitor.lines("runs-plot") == 2)
    PICTURES.mkdir(parents=True, exist_ok=True)
    visitor.page.screenshot(path=PICTURES / "6_runs.png", full_page=True)
    act(visitor, "history", "clone")
    visitor.reads("training-output_dir", "^history_2$")
    visitor.command("training", "history_2", "--val-interval 5")

    act(visitor, "spare", "delete")
    visitor.sees("#runs-question", r"Delete the run spare for good\? Checkpoints: \d+")
    visitor.click("runs-no")
    until(lambda: not visitor.page.locator("#runs-question:visible").count())  # there twice for a moment, seen once
    assert (workspace / "spare" / "latest.pth").exists()
    act(visitor, "spare", "delete")
    visitor.click("runs-yes")
    visitor.sees(".notice", "Deleted: spare")
    assert not (workspace / "spare").exists() and (workspace / "voice" / "latest.pth").exists()

    visitor.page.locator("#language").get_by_text("አማርኛ").click()
    visitor.sees("#runs-table", TEXTS["run_state.killed"][1])
    visitor.sees("#runs-table", TEXTS["runs.clone"][1])
