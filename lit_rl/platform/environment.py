"""The environment of a job: a list of what is allowed, and what the job has to know. Nothing in it comes from the one who asks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lit_rl.net.environment import VARIABLES
from lit_rl.platform.processes import DONE
from lit_rl.platform.settings import Settings

ALLOWED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|PYTHONPATH|LD_LIBRARY_PATH|CUDA_HOME|XDG_\w+|SSL_CERT_\w+|https?_proxy|no_proxy"
    r"|DISABLE_RL_REWARD_MODEL|CHROME_BINARY|(JUDGE|ROLLOUT)_TOKEN|VLLM_API_\w+|(GBOX|OCR|PYTORCH|UNIFIEDREWARD|UNIGENBENCH)_\w+"
    r"|(HF|TRANSFORMERS|HUGGING_FACE|TORCH|NCCL|GLOO|OMP|MKL|NVIDIA|TRITON|WANDB|SWANLAB|REWARD|LIT_RL|TOKENIZERS|UCX)_\w+",
    re.IGNORECASE,
)


def environment_of(settings: Settings, name: str, folder: Path, *, gpus: Sequence[int]) -> dict[str, str]:
    """Variables of a job. gpus: what CUDA_VISIBLE_DEVICES lets it see, nothing where there are none."""
    known = {variable.name for variable in VARIABLES}
    kept = {key: value for key, value in os.environ.items() if ALLOWED.fullmatch(key) or key in known}
    return kept | {
        "JOB_UUID": name,
        "PLATFORM_URL": settings.url,
        "PLATFORM_TOKEN_FILE": str(settings.token_file.resolve()),
        "PLATFORM_DONE_FILE": str(folder / DONE),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
        "PYTHONUNBUFFERED": "1",
    }
