"""One thread per process, shapes of the pure rooms checked, golden folder."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["LIT_RL_CACHE"] = ""  # findings about rows are kept by the tests of them alone

import pytest
import torch
from cpu_seconds import CpuSeconds
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook(
    ["lit_rl.samplers", "lit_rl.losses", "lit_rl.credit"],
    "beartype.beartype",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", action="store_true", help="print the CPU seconds of folders and of the dearest tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cpu-seconds"):
        config.pluginmanager.register(CpuSeconds())


def pytest_collection_finish() -> None:
    """What is there by now stays; collectors that look through it again and again take a fifth of the time in which options are parsed."""
    gc.freeze()


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restores the environment after each test: with a LOCAL_RANK left behind, the next run would wait for processes that nobody starts."""
    before, said = dict(os.environ), logging.getLogger("lightning.pytorch")
    level = said.level  # benchmarks lower their voice for good
    yield
    said.setLevel(level)
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder with one subfolder per set of reference numbers (`diffusion`, `calligrapher`, ...)."""
    folder = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
    if not folder.is_dir():
        raise FileNotFoundError(f"GOLDEN_DIR={folder} is not a folder; unset it to use the numbers shipped in tests/golden")
    return folder


@pytest.fixture(scope="session")
def sorting_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature language model that has seen the task of `toy_text`: about half of its answers are right."""
    from learners import demonstrated

    return demonstrated(tmp_path_factory.mktemp("sorting_lm"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines by name: each family with the pixel autoencoder and with a real one, SD3 without T5, FLUX without guidance input."""
    from lit_rl.miniatures.images import build_flux, build_sd3

    root = tmp_path_factory.mktemp("pipelines")
    small: dict[str, Any] = dict(height=16, width=24, hidden=32, heads=2, layers=2, text_hidden=16, text_length=16)
    kl: dict[str, Any] = dict(vae="kl", scaling_factor=1.5, shift_factor=0.1)
    sd3, flux = small | {"t5_hidden": 32}, small | {"single_layers": 1, "t5_hidden": 24}
    return {
        "sd3": build_sd3(root / "sd3", **sd3),
        "sd3-kl": build_sd3(root / "sd3-kl", **sd3, **kl, dual_attention_layers=(0,)),
        "sd3-no-t5": build_sd3(root / "sd3-no-t5", **small | {"t5_hidden": None}),
        "flux": build_flux(root / "flux", **flux),
        "flux-kl": build_flux(root / "flux-kl", **flux, **kl),
        "flux-schnell": build_flux(root / "flux-schnell", **flux, guidance_embeds=False),
    }
