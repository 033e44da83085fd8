"""README.md is short and true: what it names exists, and its reward of one's own is a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from lit_rl.command_line.renamed import CONFIG_VERSION, MOVED, RENAMED
from lit_rl.command_line.usual_classes import USUAL_CLASSES
from lit_rl.doctor.runs import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"))}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_one_screen_and_a_half() -> None:
    assert len(README.splitlines()) <= 92 and README.count("![") == 2 and README.count("\n| --- |") == 1


@pytest.mark.parametrize("page", ["README.md", "running.md", "demos.md", "CHANGELOG.md"])
def test_what_a_page_links_to_exists(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert all((PAGES[page].parent / link).exists() for link in links), links
    assert all((ROOT / config).is_file() for config in re.findall(r"configs/\w+/\w+\.yaml", text))


def test_make_has_the_targets_of_the_pages() -> None:
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in ("README.md", "demos.md") for target in re.findall(r"make (demo[\w-]*)", PAGES[page].read_text())}
    assert len(named) == 8 and named <= made


def test_the_reward_scores_and_its_run_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (source,), (overlay,) = blocks("python"), blocks("yaml")
    (tmp_path / "my_rewards.py").write_text(source)
    (tmp_path / "bright.yaml").write_text(overlay)
    command = re.search(r"python cli.py fit (.*--config bright.yaml.*?) +#", README)
    assert command is not None
    words = command[1].replace("configs/", f"{ROOT}/configs/").replace("bright.yaml", f"{tmp_path}/bright.yaml").split()
    run = parse(words)
    assert run.trainer.default_root_dir == "outputs/bright" and len(run.trainer.callbacks) == len(USUAL_CLASSES) + 1
    import my_rewards

    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    torch.testing.assert_close(my_rewards.Brightness().score(images, [{"prompt": "p"}] * 3)["brightness"], torch.tensor([0, 0.2, 1]))


def test_the_usual_callbacks_are_listed_with_their_classes() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)`", PAGES["running.md"].read_text(), re.MULTILINE))
    paths = {name: classes[-1] for name, classes in USUAL_CLASSES.items()}
    assert {name: listed[name] for name in USUAL_CLASSES} == paths
    assert yaml.safe_load(blocks("yaml")[0])["trainer"]["callbacks"]


def test_the_changelog_lists_all_that_has_another_name() -> None:
    changes = PAGES["CHANGELOG.md"].read_text()
    assert f"config_version {CONFIG_VERSION}" in changes
    assert [pair for pair in (MOVED | RENAMED).items() if f"| `{pair[0]}` | `{pair[1]}` |" not in changes] == []
