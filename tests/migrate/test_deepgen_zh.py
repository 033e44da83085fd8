"""docs/zh/deepgen.md, the guide of DeepGen-RL line by line: each command parses, each key and variable exists, each file is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_deepgen_migration import is_key, keys  # noqa: F401

from lit_rl.checkpoints.rl_to_sft import parser as converter
from lit_rl.doctor.__main__ import parser as doctor
from lit_rl.doctor.runs import parse
from lit_rl.judges import parser as judges
from lit_rl.launch.options import divided
from lit_rl.migrate.__main__ import parser as migration
from lit_rl.net.environment import SECRETS, VARIABLES
from lit_rl.rewards.server import parser as server

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/zh/deepgen.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).splitlines()
COMMANDS = [found[1] for line in BLOCKS if (found := re.match(r"(?:\w+=\w+ )*(python .*)", line))] + re.findall(
    r"`(python -m [^`]*)`", TEXT
)
PROGRAMS = {
    "lit_rl.checkpoints.rl_to_sft": converter, "lit_rl.doctor": doctor, "lit_rl.migrate": migration, "lit_rl.rewards.server": server,
    "lit_rl.judges": judges,
}  # fmt: skip
OWN = {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
"""Variables that Lightning reads itself."""
GUIDE = """scripts/reward_ocr.sh scripts/reward_unifiedreward.sh scripts/eval_unigenbench_evalmodel.sh SD3_5_MODEL_NAME_OR_PATH
CHECKPOINT OCR_URL QWEN2_5_VL_MODEL_NAME_OR_PATH UNIFIEDREWARD_THINK_URL UNIGENBENCH_API_URL scripts/train.sh OUTPUT_DIR
NNODES NODE_RANK MASTER_ADDR MASTER_PORT NGPUS --num_train_epochs --lr_scheduler_type --deepspeed --report_to --learning_rate
--rollout_n --rollout_micro_batch_size --atrain_micro_batch_size --atrain_sde_sampler --atrain_adv_type --beta
--atrain_kl_type --num_inference_steps --image_height --image_width --timestep_fraction --clip_range --sftaux_coef
--eval_freq --gradient_checkpointing zero2.json zero3.json zero3_offload.json zero3_sd3.json WANDB_API_KEY WANDB_PROJECT
WANDB_MODE SWANLAB_MODE SWANLAB_PROJ_NAME --rl_checkpoint guess_load_checkpoint deepgen_train.yaml eval/eval.yaml"""
"""Words of the guide's commands and tables."""


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_each_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if words[:2] == ["-m", "lit_rl.launch"]:
        words = ["cli.py", *divided(words[2:])[1]]
    if words[:2] == ["cli.py", "fit"]:
        assert parse(words[2:]).model.init_args.policy.class_path.endswith("DeepGenPolicy")
    else:
        own, rest = PROGRAMS[words[1]]().parse_known_args(words[2:])
        assert own and not rest


def test_each_variable_is_read_somewhere() -> None:
    sources = "".join(file.read_text() for room in ("lit_rl", "callbacks", "datamodules") for file in (ROOT / room).rglob("*.py"))
    set_there = [line.removeprefix("export ").split("=")[0] for line in BLOCKS if line.startswith("export ")]
    assert len(set_there) > 15
    for name in set_there:
        assert name in {*OWN, *SECRETS, *(variable.name for variable in VARIABLES)} or f'"{name}"' in sources, name


def test_each_line_of_the_guide_has_its_own() -> None:
    assert [word for word in GUIDE.split() if word not in TEXT] == []


def test_keys_and_files_exist(keys: set[str]) -> None:  # noqa: F811
    named = set(re.findall(r"`((?:model|trainer|run|data)\.[\w.]+)`", TEXT)) | set(re.findall(r"--((?:model|trainer)\.[\w.]+)", TEXT))
    assert len(named) > 15 and [key for key in sorted(named) if not is_key(key, keys)] == []
    for path in set(re.findall(r"configs/[\w/]+\.yaml", TEXT)):
        assert (ROOT / path).is_file(), path
