"""The demo of the platform: two seeds of the sorting task as jobs, compared, and two checkpoints of one of them merged.

    python -m lit_rl.demo.jobs [--seed 0]

The job service in its own process, jobs made and started over its API, a merge as a task of it, the merged model on held-out prompts,
and a screenshot of the page that compares the jobs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_rl.demo.__main__ import server
from lit_rl.demo.commands import begin, cli, say
from lit_rl.demo.curves import read_curves
from lit_rl.demo.sorting import ACCURACY, config, fine_tune
from lit_rl.demo.sorting import OUT as SORTING
from lit_rl.demo.stages import exported, kept
from lit_rl.envs.browser import check_packages, find_browser
from lit_rl.errors import ConfigError

OUT = Path("outputs/demo-platform")
ENDED = ("succeeded", "failed", "stopped")


class Size(NamedTuple):
    """Iterations of a job and between two of its checkpoints, and the prompts and samples of one."""

    iterations: int = 120
    every: int = 60
    prompts: int = 32
    samples: int = 8


def main() -> None:
    """Run the demo of the platform."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    started = begin(config("grpo"))
    kept(SORTING, seed, partial(fine_tune, seed))
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with server(OUT, "platform", "lit_rl.platform", "--data", str(OUT / "service"), "--page-port", "0") as url:
        say("the sorting task with two seeds, as jobs")
        uuids = run_jobs(url, exported(SORTING / "sft"), SORTING / "data", seeds=[seed, seed + 1], size=Size())
        told = compared(url, uuids)
        say("two checkpoints of the first job as one model, a task of the platform")
        merged = merge(url, uuids[0])
        seen = screenshot(f"{url}/#/compare?jobs={','.join(uuids)}", OUT / "page.png")
    say("the merged model on held-out prompts")
    place = ["--run.dir", str(OUT), "--run.name", "merged"]
    model = ["--model.init_args.policy.init_args.pretrained", str(merged), "--seed_everything", str(seed)]
    cli("validate", "--config", config("grpo"), *model, *place)
    accuracy = read_curves(OUT / "merged/logs")[ACCURACY].values[-1]
    summary = {**told, "merged_accuracy": round(accuracy, 4), "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    after = ", ".join(f"{job['held_out_accuracy']:.0%}" for job in told["jobs"])
    say(f"held-out prompts answered right after {Size().iterations} iterations: {after}; by the merged model {accuracy:.0%}")
    say(f"see {' and '.join(map(str, [*seen, OUT / 'summary.json']))}; the page again: python -m lit_rl.platform --data {OUT / 'service'}")


def ask(url: str, path: str, body: Mapping[str, object] | None = None) -> Any:
    """The service's answer: of POST with a body, of GET without. Raises SystemExit with its sentence where it refuses."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/api/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"error: {path}: {json.load(error)['error']['message']}") from error


def wait(look: Callable[[], Any]) -> Any:
    """The first answer of `look` whose state is that of an end."""
    while (found := look())["state"] not in ENDED:
        time.sleep(0.5)
    return found


def run_jobs(url: str, model: Path, data: Path, *, seeds: Sequence[int], size: Size) -> list[str]:
    """Make, start and await a job for each seed; their ids. Raises SystemExit with the reason where one fails."""
    uuids = []
    for seed in seeds:
        body = {
            "name": f"sort, seed {seed}", "algorithm": "grpo", "template": config("grpo"), "model_path": str(model.resolve()),
            "num_gpus": 0, "train_data_path": str((data / "train.jsonl").resolve()),
            "eval_data_path": str((data / "val.jsonl").resolve()),
            "batch_size": size.prompts, "rollout_n": size.samples, "overrides": overrides(seed, size),
        }  # fmt: skip
        uuids.append(str(ask(url, "jobs", body)["uuid"]))
        ask(url, f"jobs/{uuids[-1]}/start", {})
    for uuid in uuids:
        job = wait(lambda uuid=uuid: ask(url, f"jobs/{uuid}"))  # type: ignore[misc]
        if job["state"] != "succeeded":
            raise SystemExit(f"error: the job {job['name']} {job['state']}: {job['exit']['reason']}; its log is in {job['run_dir']}")
    return uuids


def overrides(seed: int, size: Size) -> dict[str, object]:
    """Keys of a job's run: its seed, its length, and checkpoints that are kept."""
    return {
        "seed_everything": seed, "trainer.max_epochs": size.iterations, "trainer.check_val_every_n_epoch": size.every,
        "run.callbacks.newest": {"every_n_epochs": size.every, "save_top_k": -1},
    }  # fmt: skip


def compared(url: str, uuids: Sequence[str]) -> dict[str, Any]:
    """Keys in which the jobs differ, and of each its name, its last mean reward and its last held-out accuracy."""
    told = ask(url, f"compare?jobs={','.join(uuids)}")
    rows = [ask(url, f"jobs/{uuid}/metrics?split=eval") for uuid in uuids]
    jobs = [
        {"name": ask(url, f"jobs/{uuid}")["name"], "reward_mean": told["summary"][uuid]["reward_mean"],
         "held_out_accuracy": round(next(row[ACCURACY] for row in reversed(evaluated) if row.get(ACCURACY) is not None), 4)}
        for uuid, evaluated in zip(uuids, rows, strict=True)
    ]  # fmt: skip
    return {"differ_in": sorted(told["config_diff"]), "jobs": jobs}


def merge(url: str, uuid: str) -> Path:
    """The folder of the mean of a job's first and last checkpoint. Raises SystemExit where it fails."""
    found = [one for one in ask(url, f"jobs/{uuid}/checkpoints") if Path(one["path"]).name.startswith("iteration-") and one["exists"]]
    inputs = [{"path": one["path"], "weight": 0.5} for one in (found[0], found[-1])]
    task = ask(url, "models/merge", {"inputs": inputs, "method": "linear", "output_name": "merged"})
    done = wait(lambda: ask(url, f"tasks/{task['id']}"))
    if done["state"] != "succeeded":
        raise SystemExit(f"error: the merge failed: {done['message']}")
    return Path(done["output"])


def screenshot(address: str, file: Path) -> list[Path]:
    """Take a picture of a page, once its curves are drawn, and return its file; only a sentence, and no file, where there is no browser."""
    try:
        check_packages("playwright")
        program = find_browser()
    except ConfigError as error:
        say(f"no screenshot: {error}")
        return []
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(program), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en").new_page()
        page.goto(address)
        page.locator("canvas").first.wait_for(timeout=120_000)
        page.screenshot(path=str(file), full_page=True)
        browser.close()
    return [file]


if __name__ == "__main__":
    main()
