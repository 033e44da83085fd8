"""The page that the package carries is what its sources make, small, and free of anything that its policy forbids."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES, BUILT = ROOT / "frontend", ROOT / "lit_rl" / "platform" / "page"
FILES = ("index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts")
COMPRESSED = 150 * 1024
"""Bytes of scripts and styles, by gzip."""


def test_the_built_page_was_made_of_these_sources() -> None:
    """The build records the digest of what it read (frontend/vite.config.ts); `make page` renews both."""
    paths = [*FILES, *(str(path.relative_to(SOURCES)) for path in (SOURCES / "src").rglob("*") if path.is_file())]
    digest = hashlib.sha256()
    for name in sorted(paths):
        digest.update(name.encode() + b"\0" + (SOURCES / name).read_bytes() + b"\0")
    assert (BUILT / "sources.sha256").read_text().strip() == digest.hexdigest(), "run `make page` and commit"


@pytest.mark.skipif(not (shutil.which("npm") and (SOURCES / "node_modules").is_dir()), reason="no npm, or no `npm install` in frontend/")
def test_a_build_gives_the_committed_files(tmp_path: Path) -> None:
    """The types hold as well."""
    out = tmp_path / "page"
    subprocess.run(["npm", "run", "build"], cwd=SOURCES, env={**os.environ, "PAGE_OUT": str(out)}, check=True, capture_output=True)
    assert files(out) == files(BUILT)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_page_is_in_the_package() -> None:
    """Every file of it is among the data that setuptools puts beside the package, see pyproject.toml."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["lit_rl.platform"]
    packed = {name for pattern in data for name in glob.glob(pattern, root_dir=BUILT.parent, recursive=True)}
    assert {f"page/{name}" for name in files(BUILT)} <= packed


def test_scripts_and_styles_keep_their_budget() -> None:
    """One script and one style sheet, at most 150 KiB together."""
    assets = sorted((BUILT / "assets").iterdir())
    assert sorted(path.suffix for path in assets) == [".css", ".js", ".svg"]
    assert sum(len(gzip.compress(path.read_bytes())) for path in assets) <= COMPRESSED


def test_nothing_is_inline_or_foreign() -> None:
    """The policy of the service forbids it: scripts, styles and handlers in HTML, addresses of other hosts, HTML made of strings."""
    html = (BUILT / "index.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]*)"', html) and all(one.startswith("./") for one in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert not re.search(r"<style|<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=", html)
    sources = "".join(path.read_text() for path in (SOURCES / "src").rglob("*") if path.suffix in (".ts", ".tsx", ".css"))
    assert not re.search(r"innerHTML|dangerouslySetInnerHTML|insertAdjacentHTML|document\.write|\beval\(|https?://|//cdn", sources)


def test_both_languages_say_everything() -> None:
    """Each text exists in English and Chinese, with the same values in it, and every text is used."""
    english, chinese = (json.loads((SOURCES / "src" / "text" / f"{name}.json").read_text()) for name in ("en", "zh-CN"))
    assert list(english) == list(chinese)
    holes = re.compile(r"\{\w+\}")
    assert {key: sorted(holes.findall(text)) for key, text in english.items()} == {
        key: sorted(holes.findall(text)) for key, text in chinese.items()
    }
    code = "".join(path.read_text() for path in (SOURCES / "src").rglob("*.ts*"))
    whole = {key for key in english if f'"{key}"' in code}
    prefixes = tuple(re.findall(r"told\(\"(\w+)\"", code)) + tuple(re.findall(r"t\(`(\w+)\.", code))
    assert not [key for key in english if key not in whole and not key.startswith(tuple(f"{one}." for one in prefixes))]
