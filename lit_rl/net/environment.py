"""Variables of the environment that stand for options of a run. An option beats the YAML, the YAML a variable, a variable the default.
`lit_rl.net.env_file` takes variables that are not set from `.env`.

This is the only table of them; `lit_rl.command_line.environment` fills them in. A guide's own variables are rows here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

DEEPGEN = "lit_rl.policies.deepgen.DeepGenPolicy"
EVALUATION = "callbacks.evaluation_sets.EvaluationSets"
PICTURES = "datamodules.picture_sources.PictureSources"
WANDB, SWANLAB = "callbacks.trackers.WandB", "callbacks.trackers.SwanLab"


@dataclass(frozen=True)
class Variable:
    """A variable and the option that has its value where nothing else gives one.

    name: of the variable. option: of the class `owner` and its descendants; without an owner a key of the run. within: a class that the
    run must name, since other programs use a name as common as OUTPUT_DIR for things of their own. convert: makes the value of the text;
    its ValueError says what the text must be. unset: what the option holds when nobody has given it. having: another option of the class,
    and its value where the variable counts. itself: the class reads the variable where the option is null, and nothing is filled in.
    """

    name: str
    option: str
    owner: str | None = None
    within: str | None = None
    convert: Callable[[str], object] = str
    unset: object = None
    having: tuple[str, str] | None = None
    itself: bool = False


def count(text: str) -> int:
    """The text as a positive whole number."""
    if not text.isdecimal() or not int(text):
        raise ValueError("a positive whole number")
    return int(text)


def mode(text: str) -> str:
    """The mode of a tracker, which says where its run goes."""
    if text not in ("online", "offline", "disabled"):
        raise ValueError("one of online, offline, disabled")
    return text


VARIABLES = (
    Variable("SD3_5_MODEL_NAME_OR_PATH", "pretrained", DEEPGEN),
    Variable("QWEN2_5_VL_MODEL_NAME_OR_PATH", "language_model", DEEPGEN),
    Variable("CHECKPOINT", "checkpoint", DEEPGEN),
    Variable("EVAL_DATASET_CONFIG", "config", EVALUATION),
    Variable("UNIGENBENCH_API_URL", "judge", EVALUATION, itself=True),
    Variable("OCR_URL", "urls", "lit_rl.rewards.services.ServiceReward", having=("service", "ocr"), itself=True),
    Variable("UNIFIEDREWARD_THINK_URL", "judge", "lit_rl.rewards.judges.pairwise.UnifiedRewardThink", itself=True),
    Variable("UNIFIEDREWARD_THINK_URL", "judge", "lit_rl.rewards.judges.pointwise.UnifiedReward", itself=True),
    Variable("DATASET_CONFIG", "train", "datamodules.prompt_sets.PromptSets"),
    Variable("CLIP_MODEL_NAME_OR_PATH", "model_path", "lit_rl.rewards.clip.CLIPSimilarity"),
    Variable("SFTAUX_DATASET_CONFIG", "sources", PICTURES),
    Variable("VLLM_API_BASE", "urls", "lit_rl.rollouts.http.HTTPEngine"),
    Variable("OUTPUT_DIR", "run.dir", within=DEEPGEN, unset="outputs"),
    Variable("NNODES", "trainer.num_nodes", within=DEEPGEN, convert=count, unset=1),
    Variable("NGPUS", "trainer.devices", within=DEEPGEN, convert=count, unset="auto"),
    Variable("WANDB_PROJECT", "project", WANDB),
    Variable("WANDB_RUN_NAME", "name", WANDB),
    Variable("WANDB_MODE", "mode", WANDB, convert=mode),
    Variable("SWANLAB_PROJ_NAME", "project", SWANLAB),
    Variable("SWANLAB_EXP_NAME", "name", SWANLAB),
    Variable("SWANLAB_MODE", "mode", SWANLAB, convert=mode),
)  # fmt: skip
SECRETS = ("WANDB_API_KEY", "SWANLAB_API_KEY", "REWARD_TOKEN", "ROLLOUT_TOKEN", "JUDGE_TOKEN", "GBOX_API_KEY", "HF_TOKEN")
"""Variables that the programs themselves read; what they hold is never shown."""
HUB = ("HF_ENDPOINT", "HF_TOKEN")
"""Variables that the hub's client reads when it is imported."""
SHORTEST = 6
"""Characters of a secret that is looked for in texts: a shorter one would be found in other words."""


def redacted(text: str) -> str:
    """The text with stars for the values of secret variables and for users and passwords in addresses."""
    for name in SECRETS:
        if len(value := os.environ.get(name, "").strip()) >= SHORTEST:
            text = text.replace(value, "***")
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def variable_of(owner: str, option: str) -> str:
    """The variable of a class's option."""
    return next(variable.name for variable in VARIABLES if (variable.owner, variable.option) == (owner, option))
