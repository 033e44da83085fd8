"""A job from the form to its end, seen on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_browser import opened, started
from playwright.sync_api import Page, expect
from served_platform import listening

from lit_rl.demo.sorting import prepare

MINUTES = 240_000
"""Milliseconds that a step may take on a busy machine."""


def setting(page: Page, key: str, value: str) -> None:
    """Add a row of key and value to the settings."""
    page.get_by_role("button", name="Add a setting").click()
    page.get_by_label("Key").last.fill(key)
    page.get_by_label("Value").last.fill(value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_of_the_form_runs_to_its_end_while_the_page_looks_on(tmp_path: Path) -> None:
    """The sorting demo's run on its own untrained model, two iterations of four groups of four answers."""
    prepare(tmp_path, seed=0)
    with listening(tmp_path) as url, started() as browser, opened(browser, f"{url}/#/new") as page:
        page.get_by_label(re.compile("^name")).fill("sort")
        page.locator("#field-algorithm").select_option("grpo")
        page.locator("#field-template").select_option("configs/demo/grpo_sort.yaml")
        for name, value in {
            "model_path": tmp_path / "model",
            "train_data_path": tmp_path / "data/train.jsonl",
            "eval_data_path": tmp_path / "data/val.jsonl",
        }.items():
            page.locator(f"#field-{name}").fill(str(value))
        page.locator("[data-settings] summary").click()
        page.locator("[id='field-model.init_args.prompts_per_iteration']").fill("4")
        page.locator("[id='field-model.init_args.group_size']").fill("4")
        setting(page, "trainer.max_epochs", "2")
        setting(page, "trainer.num_sanity_val_steps", "0")
        page.get_by_role("button", name="Check").click()
        expect(page.locator("[data-plan]")).to_contain_text("ready to start")
        expect(page.get_by_text("group_size: 4")).to_be_visible()
        page.get_by_role("button", name="Start").click()
        page.get_by_role("tab", name="Samples").click()
        expect(page.locator("[data-sample]")).to_have_count(0)
        expect(page.locator("[data-sample]")).not_to_have_count(0, timeout=MINUTES)
        page.get_by_role("tab", name="Log").click()
        expect(page.locator("[data-log]")).to_contain_text(re.compile(r"\S"), timeout=MINUTES)
        expect(page.locator("[data-state=succeeded]")).to_be_visible(timeout=MINUTES)
        page.get_by_role("tab", name="Overview").click()
        expect(page.locator("[data-tile=reward_mean]")).to_be_visible()
        expect(page.locator("[data-plot] canvas")).not_to_have_count(0)
