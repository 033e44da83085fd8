"""Two and three processes for the whole session, and a miniature pipeline on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from comparing import LORA, Written
from deepgen import build as build_deepgen
from fill import build_fill
from pair import Pair

from lit_rl.miniatures.images import build_sd3


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    two = Pair(tmp_path_factory.mktemp("pair"))
    yield two
    two.stop()


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    processes = Pair(tmp_path_factory.mktemp("three"), size=3)
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """alone(fit, **settings): folder of a single process's run, made once, and what `fit(folder, "one", **settings)` returned."""
    made: dict[str, tuple[Path, Any]] = {}

    def run(fit: Callable[..., Any], **settings: Any) -> tuple[Path, Any]:
        key = f"{fit} {settings}"
        if key not in made:
            folder = tmp_path_factory.mktemp("alone")
            made[key] = folder, fit(str(folder), "one", **settings)
        return made[key]

    return run


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sd3"
    return build_sd3(folder, height=16, width=24, hidden=32, heads=2, layers=2, text_hidden=16, text_length=16, t5_hidden=32)


@pytest.fixture(scope="session")
def written(pair: Pair, tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path) -> Written:
    """written(strategy): folder of a LoRA run under it on two processes, with `comparing.AT`."""
    done: dict[str, Path] = {}

    def write(strategy: str) -> Path:
        if strategy not in done:
            folder = tmp_path_factory.mktemp(strategy)
            settings: dict[str, Any] = dict(sd3=LORA | {"pretrained": str(sd3_folder)}, trainer_args=dict(max_epochs=2))
            save, method = dict(every_n_train_steps=1), dict(train_micro_batch=4)
            pair.run("fit", folder=str(folder), strategy=strategy, method_args=method, save=save, **settings)
            done[strategy] = folder
        return done[strategy]

    return write


@pytest.fixture(scope="session")
def deepgen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deepgen(tmp_path_factory.mktemp("pipelines") / "deepgen", language_layers=2)


@pytest.fixture(scope="session")
def fill_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fill(tmp_path_factory.mktemp("pipelines") / "fill")
