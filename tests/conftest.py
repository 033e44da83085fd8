"""One thread per process, shapes of the pure rooms checked, golden folder."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook(
    ["lit_rl.samplers", "lit_rl.losses", "lit_rl.advantages", "lit_rl.token_advantages", "lit_rl.packing"], "beartype.beartype"
)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test does to the environment ends with it: a LOCAL_RANK left behind has the next run wait for processes that nobody starts."""
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
