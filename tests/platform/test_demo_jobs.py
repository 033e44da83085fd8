"""The demo of the platform at a small size: its jobs, what it says of them, the merged model and the picture of the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from served_platform import listening

from lit_rl.demo.jobs import Size, compared, merge, run_jobs, screenshot
from lit_rl.demo.sorting import prepare


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_seeds_as_jobs_are_compared_merged_and_seen(tmp_path: Path) -> None:
    """Two iterations of four groups of four answers on the untrained model of the sorting demo."""
    prepare(tmp_path, seed=0)
    with listening(tmp_path, gpu_ids=(), cpu_jobs=2) as url:
        uuids = run_jobs(url, tmp_path / "model", tmp_path / "data", seeds=[3, 4], size=Size(2, 1, 4, 4))
        told = compared(url, uuids)
        merged = merge(url, uuids[0])
        [page] = screenshot(f"{url}/#/compare?jobs={','.join(uuids)}", tmp_path / "page.png")
    assert told["differ_in"] == ["seed_everything"]
    assert [job["name"] for job in told["jobs"]] == ["sort, seed 3", "sort, seed 4"]
    assert all(0 <= job[name] <= 1 for job in told["jobs"] for name in ("reward_mean", "held_out_accuracy"))
    assert (merged / "model.safetensors").is_file() and (merged / "config.json").is_file()
    assert Image.open(page).width == 1280


@pytest.mark.parametrize("missing", ["browser", "playwright"])
def test_without_a_browser_no_picture_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    if missing == "browser":
        monkeypatch.setenv("CHROME_BINARY", str(tmp_path / "none"))
    else:
        monkeypatch.setattr("lit_rl.envs.browser.find_spec", lambda name: None)
    assert screenshot("http://127.0.0.1:1", tmp_path / "page.png") == []
    assert f"no screenshot: {missing if missing == 'playwright' else 'CHROME_BINARY'}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
