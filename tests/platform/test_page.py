"""The page in a real browser, on a real service: what a user sees, with the mouse, with the keyboard, on a phone, as somebody else."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from page_browser import HOSTILE, opened, started
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect
from served_platform import GUIDE_JOB, listening

from lit_rl.envs.browser import find_browser
from lit_rl.errors import ConfigError

try:
    find_browser()
    HERE = True
except ConfigError:
    HERE = False

pytestmark = pytest.mark.skipif(not HERE and not os.environ.get("CI"), reason="no browser here: apt-get install chromium-headless-shell")
FIRST_PAGE = 300 * 1024
"""Bytes of the first page, with its data."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(tmp_path_factory.mktemp("platform")) as url:
        fill(url)
        yield url


def fill(url: str) -> None:
    """A job that cannot start, one with a hostile name, and one of somebody's own script: 60 steps, samples, checkpoints, GPUs."""
    ask(url, "jobs", GUIDE_JOB)
    ask(url, "jobs", {"name": HOSTILE, "algorithm": "grpo", "description": HOSTILE, "tags": [HOSTILE]})
    ask(url, "jobs/watched/metrics", {"points": [{"step": step, "metrics": metrics(step)} for step in range(60)]})
    for step in (20, 40):
        for group, prompt in enumerate((HOSTILE, "483920=")):
            items = [sample(step, prompt, group, number) for number in range(3)]
            parts = {"samples": (None, json.dumps({"items": items})), "picture": ("p.png", picture(), "image/png")}
            requests.post(f"{url}/api/jobs/watched/samples", files=parts, timeout=30).raise_for_status()
        ask(
            url,
            "jobs/watched/checkpoints",
            {"step": step, "path": f"/runs/{HOSTILE}/{step}.ckpt", "eval_results": {"val/score": step / 50}},
        )
    gpu = {"gpu_index": 0, "utilization": 91.0, "memory_used": 65.0, "memory_total": 80.0, "temperature": 71.0}
    ask(url, "jobs/watched/gpu", {"samples": [gpu]})


def metrics(step: int) -> dict[str, float]:
    """What a run with two rewards reports of a step; its policy has moved too far."""
    return {
        "reward_mean": 0.2 + 0.01 * step, "policy_loss": 0.02 - 0.001 * step, "kl_divergence": 0.003 * step, "clip_fraction": 0.2,
        "entropy": 1.0,
        "reward/rules": 0.1 + 0.012 * step, "reward/judge": 0.5, "reward/judge/failed_fraction": 0.05, "zero_std_ratio": 0.01 * step,
        "group_std_mean": 0.4, "time/rollout_s": 3.0, "time/train_s": 2.0, "time/other_s": 0.1, HOSTILE: 1.0,
    }  # fmt: skip


def sample(step: int, prompt: str, group: int, number: int) -> dict[str, Any]:
    pictures = ["picture"] * (number + 1) if group else []
    return {
        "step": step,
        "group": group,
        "prompt": prompt,
        "text": f"{HOSTILE} {number}",
        "rewards": {"rules": number / 2},
        "advantage": number - 1.0,
        "images": pictures,
    }


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 80, 40)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def watched(service: str) -> str:
    return f"{service}/#/jobs/watched"


def ask(url: str, path: str, body: Any) -> Any:
    answer = requests.post(f"{url}/api/{path}", json=body, timeout=30)
    assert answer.ok, answer.text
    return answer.json()


def test_the_first_page_is_small_and_asks_nobody_else(browser: Browser, service: str) -> None:
    """HTML, script, style, icon, the jobs: at most 6 requests, at most 300 KiB with data, all of this server."""
    asked: list[Request] = []
    with opened(browser, "about:blank") as page:
        page.on("requestfinished", lambda request: asked.append(request))
        page.goto(service)
        expect(page.locator("tr[data-job]")).not_to_have_count(0)
        assert {request.url.split("/")[2] for request in asked} == {service.split("/")[2]}
        assert len(asked) <= 6, [request.url for request in asked]
        sizes = [request.sizes() for request in asked]
        assert sum(size["responseBodySize"] + size["responseHeadersSize"] for size in sizes) <= FIRST_PAGE


def test_names_are_text_whatever_they_hold(browser: Browser, service: str) -> None:
    with opened(browser, f"{service}/#/jobs") as page:
        row = page.locator("tr[data-job]").filter(has_text="onerror")
        expect(row.get_by_role("link")).to_have_text(HOSTILE)
        row.get_by_role("link").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text(HOSTILE)
        expect(page.locator("main img, main script")).to_have_count(0)


@pytest.mark.parametrize(("language", "jobs"), [("en-GB", "Jobs"), ("zh-CN", "任务")])
def test_language_and_colours_are_the_browsers_until_chosen_otherwise(browser: Browser, service: str, language: str, jobs: str) -> None:
    with opened(browser, service, locale=language, color_scheme="dark", width=390) as page:
        title = page.get_by_role("heading", level=1)
        expect(title).to_have_text(jobs)
        dark = background(page)
        page.locator("[data-theme-select]").select_option("light")
        assert background(page) != dark
        page.locator("[data-language]").click()
        expect(title).not_to_have_text(jobs)
        page.reload()
        expect(title).not_to_have_text(jobs)
        assert background(page) != dark


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_the_form_is_the_services_and_shows_problems_before_the_start(browser: Browser, service: str) -> None:
    """By keyboard alone."""
    with opened(browser, f"{service}/#/new", allowed="422") as page:
        page.locator("#field-name").focus()
        page.keyboard.type("from the form")
        page.locator("#field-algorithm").focus()
        page.keyboard.type("grpo")
        page.locator("#field-train_data_path").focus()
        page.keyboard.type("/no/such/file.jsonl")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_contain_text("from the form")
        expect(page.locator("[data-state=created]")).to_be_visible()
        assert re.fullmatch(r"#/jobs/[0-9a-f-]{36}", page.evaluate("location.hash"))


def test_another_user_enters_with_the_token(browser: Browser, tmp_path: Path) -> None:
    with listening(tmp_path, owner=lambda *_: os.getuid() + 1) as url, opened(browser, url, allowed="401|WebSocket") as page:
        token = page.locator("[data-token]")
        token.fill("not the token")
        token.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("not the token")
        token.fill((tmp_path / "data" / "token").read_text())
        token.press("Enter")
        expect(page.get_by_role("link", name="New job")).to_be_visible()
        assert [cookie["httpOnly"] for cookie in page.context.cookies()] == [True]


def test_what_is_not_normal_is_said(browser: Browser, watched: str) -> None:
    """The guide's ranges: KL below 0.1, clip fraction from 0.1 to 0.3; and the share of groups that still teach."""
    with opened(browser, watched, locale="zh-CN") as page:
        expect(page.locator("[data-tile=kl_divergence]")).to_have_class(re.compile("warn"))
        expect(page.locator("[data-tile=clip_fraction]")).not_to_have_class(re.compile("warn"))
        expect(page.locator("[data-says=kl_divergence]")).to_contain_text("0.177")
        expect(page.get_by_text("41 % 的组仍有学习信号")).to_be_visible()
        row = page.get_by_role("row").filter(has_text="judge")
        expect(row).to_contain_text("5 %")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("tab", ["overview", "charts", "samples", "log", "checkpoints", "config"])
def test_every_tab_fits_its_window_and_shows_text_only(browser: Browser, watched: str, tab: str, width: int) -> None:
    with opened(browser, f"{watched}/{tab}", width=width, color_scheme="dark") as page:
        expect(page.get_by_role("tab", selected=True)).to_have_attribute("data-tab", tab)
        expect(page.locator("main script, main [onerror]")).to_have_count(0)
        page.wait_for_load_state("networkidle")


def test_the_gallery_follows_a_prompt_over_time(browser: Browser, watched: str) -> None:
    """The newest step first; the best of a group first; frames of a film strip beside each other."""
    with opened(browser, f"{watched}/samples") as page:
        cards = page.locator("[data-sample]")
        expect(cards).to_have_count(6)
        expect(cards.nth(0)).to_contain_text("+1")
        expect(cards.nth(3).locator("img")).to_have_count(3)
        assert cards.nth(3).locator("img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 48
        page.get_by_label("Prompt").select_option("483920=")
        expect(cards).to_have_count(6)
        expect(page.locator("h3").filter(has_text="step 20")).to_have_count(1)
        page.get_by_label("Order").select_option("worst")
        expect(cards.nth(0)).to_contain_text("-1")


def test_samples_of_different_prompts_lie_beside_each_other(browser: Browser, service: str) -> None:
    for group in range(3):
        parts = {"samples": (None, json.dumps({"items": [sample(1, f"p{group}", 0, 0)]}))}
        requests.post(f"{service}/api/jobs/singles/samples", files=parts, timeout=30).raise_for_status()
    with opened(browser, f"{service}/#/jobs/singles/samples") as page:
        expect(page.locator("[data-sample]")).to_have_count(3)
        assert len({place["y"] for one in page.locator(".group").all() if (place := one.bounding_box())}) == 1


def test_jobs_are_compared(browser: Browser, service: str) -> None:
    """Chosen in the list; what their settings differ in is a table, their curves lie over each other."""
    ids = [ask(service, "jobs", GUIDE_JOB | {"name": f"seed {seed}", "overrides": {"seed_everything": seed}})["uuid"] for seed in range(2)]
    with opened(browser, f"{service}/#/jobs") as page:
        for name in ids:
            page.locator(f"[data-job='{name}'] input").check()
        page.get_by_role("button", name="Compare (2)").click()
        row = page.locator("[data-table=diff] tr").filter(has_text="seed_everything")
        expect(row.locator("td")).to_have_text(["0", "1"])
        page.goto(f"{service}/#/machine")
        expect(page.locator("[data-host]")).to_contain_text("CPU")


def test_alerts_tables_and_the_database_are_there_to_take(browser: Browser, service: str) -> None:
    """Open alerts of all jobs lead to their job; the curves of a job and the whole database are files."""
    with opened(browser, f"{service}/#/alerts") as page:
        alert = page.locator("[data-alert=kl]")
        expect(alert).to_contain_text("kl_divergence is 0.102, above 0.1")
        alert.get_by_role("link", name="watched").click()
        expect(page.locator("[data-alerts]")).to_contain_text("kl_divergence")
        expect(page.get_by_role("button", name="Delete")).to_be_visible()
        expect(page.get_by_role("button", name="Stop with checkpoint")).to_have_count(0)  # somebody else's run
        page.get_by_role("tab", name="All charts").click()
        with page.expect_download() as table:
            page.locator("[data-csv]").click()
        lines = Path(table.value.path()).read_text().splitlines()
        assert len(lines) == 61 and "reward_mean" in lines[0].split(",")
        page.goto(f"{service}/#/machine")
        with page.expect_download() as database:
            page.locator("[data-backup]").click()
        assert Path(database.value.path()).read_bytes().startswith(b"SQLite format 3")


MERGE = """
import sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
print("progress 1/2 half", flush=True)
out.mkdir(parents=True)
(out / "words").write_text(" ".join(sys.argv[1:]))
"""


def test_models_are_merged_and_the_best_is_exported_by_buttons(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page asks for the merge of what was chosen and for the best checkpoint; a stand-in makes the models."""
    (tmp_path / "lit_rl").mkdir()
    (tmp_path / "lit_rl/__init__.py").touch()
    (tmp_path / "lit_rl/merge.py").write_text(MERGE)
    monkeypatch.setattr("lit_rl.platform.service.REPOSITORY", tmp_path)
    models = tmp_path / "data/models"
    with listening(tmp_path) as url:
        for step in (1, 2):
            (tmp_path / f"{step}.ckpt").touch()
            ask(url, "jobs/j/checkpoints", {"step": step, "path": str(tmp_path / f"{step}.ckpt"), "eval_results": {"val/score": step / 4}})
        with opened(browser, f"{url}/#/jobs/j/checkpoints") as page:
            page.get_by_role("button", name="Export the best").click()
            expect(page.locator("[data-task=succeeded]")).to_be_visible()
            expect(page.locator("[data-checkpoint='2']")).to_contain_text("best")
            page.goto(f"{url}/#/models")
            for step in (1, 2):
                page.locator(f"[data-model$='{step}.ckpt'] input").check()
            page.get_by_label("Method").select_option("ties")
            page.get_by_label("Base model").fill(str(tmp_path))
            page.get_by_label("Name of the result").fill("both")
            page.get_by_role("button", name="Merge").click()
            expect(page.locator("[data-task=succeeded]")).to_be_visible()
            expect(page.locator("[data-model$='/models/both']")).to_be_visible()
    assert str(tmp_path / "2.ckpt") in (models / "j-best/words").read_text()
    merged = (models / "both/words").read_text()
    assert "--method ties" in merged and f"--base {tmp_path}" in merged and f"{tmp_path / '1.ckpt'} {tmp_path / '2.ckpt'}" in merged


def test_the_keyboard_is_enough(browser: Browser, watched: str) -> None:
    """Arrows move between tabs and between samples, Enter opens, Escape closes and gives the focus back."""
    with opened(browser, watched) as page:
        page.get_by_role("tab", name="Overview").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Samples")).to_be_focused()
        cards = page.locator("[data-sample]")
        cards.first.focus()
        page.keyboard.press("Enter")
        viewer = page.get_by_role("dialog")
        count = cards.count()
        expect(viewer.get_by_role("heading")).to_contain_text(f"1/{count}")
        page.keyboard.press("ArrowRight")
        expect(viewer.get_by_role("heading")).to_contain_text(f"2/{count}")
        page.keyboard.press("Escape")
        expect(viewer).to_have_count(0)
        expect(cards.first).to_be_focused()


def test_metrics_of_any_name_are_shown_and_numbers_are_the_newest(browser: Browser, service: str) -> None:
    """A job without any metric that a panel is for has its charts; of a curve in buckets the last point is the run's own."""
    ask(service, "jobs/own/metrics", {"points": [{"step": 1, "metrics": {"accuracy": 0.5}}]})
    for start in (0, 1000, 2000):
        points = [{"step": step, "metrics": {"reward_mean": float(step)}} for step in range(start, start + 1000)]
        ask(service, "jobs/long/metrics", {"points": points})
    with opened(browser, f"{service}/#/jobs/own") as page:
        expect(page.locator("[data-plot=accuracy] canvas")).to_be_visible()
        page.goto(f"{service}/#/jobs/long")
        expect(page.locator("[data-tile=reward_mean] b")).to_have_text("2999")


def test_cards_of_a_row_are_equally_high(browser: Browser, watched: str) -> None:
    """The chart beside the one with a table takes the room that the table has."""
    with opened(browser, watched) as page:
        expect(page.locator(".grid .plot canvas").nth(1)).to_be_visible()
        heights = page.locator(".grid").first.locator(".plot").evaluate_all("cards => cards.map(card => card.offsetHeight)")
        drawn = page.locator(".grid").first.locator("canvas").evaluate_all("all => all.map(canvas => canvas.offsetHeight)")
        assert len(heights) == 2 and heights[0] == heights[1] and drawn[0] > drawn[1]


def test_charts_have_ink(browser: Browser, watched: str) -> None:
    """On a phone, in the dark, every chart has drawn something in the colour of its first curve."""
    with opened(browser, watched, width=390, color_scheme="dark") as page:
        expect(page.locator("[data-plot]")).not_to_have_count(0)
        expect(page.locator("[data-plot] canvas")).to_have_count(page.locator("[data-plot]").count())
        for canvas in page.locator("[data-plot] canvas").all():
            assert canvas.evaluate(INK) >= 5


INK = """canvas => {
  const color = getComputedStyle(canvas.closest("figure").querySelector(".swatch")).backgroundColor.match(/\\d+/g).map(Number);
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 0; i < pixels.length; i += 4)
    if (color.every((value, j) => Math.abs(pixels[i + j] - value) < 40) && pixels[i + 3] > 200) count++;
  return count;
}"""
"""Pixels of a canvas in about the colour of the first name of its legend."""


def test_a_lost_connection_comes_back_with_what_was_missed(browser: Browser, service: str) -> None:
    job = f"{service}/api/jobs/flaky"
    with opened(browser, "about:blank") as page:
        sockets = list[Any]()
        page.route_web_socket(re.compile("/ws/jobs/"), lambda socket: (sockets.append(socket), socket.connect_to_server()))
        ask(service, "jobs/flaky/metrics", {"points": [{"step": 1, "metrics": {"reward_mean": 0.25}}]})
        page.goto(f"{service}/#/jobs/flaky")
        tile = page.locator("[data-tile=reward_mean] b")
        expect(tile).to_have_text("0.25")
        sockets[-1].close()
        requests.post(f"{job}/metrics", json={"points": [{"step": 2, "metrics": {"reward_mean": 0.75}}]}, timeout=30)
        expect(tile).to_have_text("0.75")
        assert len(sockets) >= 2
