"""docs/zh/agents.md, the guide of the computer-use agents line by line: each command parses, each key exists, each file is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_cua_migration import keys  # noqa: F401

from lit_rl.doctor.__main__ import parser as doctor
from lit_rl.doctor.runs import parse
from lit_rl.launch.options import divided
from lit_rl.migrate.__main__ import parser as migration
from lit_rl.net.environment import HUB, SECRETS, VARIABLES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/zh/agents.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).splitlines()
COMMANDS = [found[1] for line in BLOCKS if (found := re.match(r"(?:\w+=\S+ )*(python .*)", line.partition("#")[0]))]
PROGRAMS = {"lit_rl.doctor": doctor, "lit_rl.migrate": migration}
GUIDE = """GBOX_API_KEY HF_ENDPOINT HF_TOKEN WANDB_API_KEY WANDB_PROJECT VLLM_API_BASE env.example model.name max_seq_length model.lora.r
model.lora.alpha training.learning_rate training.batch_size training.max_steps training.output_dir rollout.num_rollouts rollout.max_turns
rollout.concurrency inference.vllm.api_base inference.vllm.timeout docker_train_areal.sh docker-compose.areal.yml run_vllm_base.sh
training.log rollouts.log checkpoints/checkpoint-50 best_model --resume --resume_from_checkpoint nvidia-smi vllm-cua-areal ConnectionError
TimeoutError lora.rank GPU_MEMORY_UTILIZATION https://hf-mirror.com target_accuracy"""
"""Words of the guide's commands and tables."""


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_each_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if words[:2] == ["-m", "lit_rl.launch"]:
        words = ["cli.py", *divided(words[2:])[1]]
    if words[:2] == ["cli.py", "fit"]:
        cut = words.index("--ckpt_path") if "--ckpt_path" in words else len(words)
        assert parse(words[2:cut]).model.class_path == "lit_rl.methods.agent_grpo.AgentGRPO"
    elif words[1] in PROGRAMS:
        own, rest = PROGRAMS[words[1]]().parse_known_args(words[2:])
        assert own and not rest


def test_each_line_of_the_guide_has_its_own() -> None:
    assert [word for word in GUIDE.split() if word not in TEXT] == []
    known = {*SECRETS, *HUB, *(variable.name for variable in VARIABLES)}
    assert {"GBOX_API_KEY", "HF_ENDPOINT", "HF_TOKEN", "WANDB_API_KEY", "WANDB_PROJECT", "VLLM_API_BASE"} <= known


def test_keys_and_files_exist(keys: set[str]) -> None:  # noqa: F811
    named = set(re.findall(r"`((?:model\.init_args|trainer|run)\.[\w.]+)`", TEXT))
    assert len(named) > 12 and sorted(named - keys) == []
    paths = {line.split()[0] for line in BLOCKS if line.startswith(("docker/", "scripts/"))} | set(
        re.findall(r"(?:configs|docker)/[\w/.-]+\.ya?ml", TEXT)
    )
    assert len(paths) >= 6 and [path for path in paths if not (ROOT / path).is_file()] == []
