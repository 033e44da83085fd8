"""Runs for a Ray cluster: Flow-GRPO with a reward server, under FSDP2, GRPO, an agent; each small, and the same on one process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from digit_world import digit_tasks
from forked import ROOT, ended, forked_script
from test_launched_runs import config as flow_config
from torch import Tensor
from toy import Brightness
from toy_text import model_folder

from lit_rl.types import Info

SERVERS = """reward:
  command: "{python} -m lit_rl.rewards.server --host {host} --port {port} --scorers toy.Brightness"
  variable: REWARD_SERVER_URLS
"""
FSDP2 = {
    "class_path": "lit_rl.strategies.fsdp2.FSDP2Strategy",
    "init_args": {"save_distributed_checkpoint": False, "gather_dtype": None, "timeout": "0:05:00"},
}
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "eps": 1e-3}}
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/scale", Path(__file__).parent)))


class Shipped(Brightness):
    """As `toy.Brightness`; notes in $LIT_RL_SEEN what lies in the working folder of the process."""

    def score(self, media: Tensor, info: list[Info]) -> Mapping[str, Tensor]:
        Path(os.environ["LIT_RL_SEEN"]).write_text("\n".join(sorted(os.listdir())))
        return super().score(media, info)


def flow(folder: Path) -> dict[str, Any]:
    """Flow-GRPO with the reward server that $REWARD_SERVER_URLS names; its folder is relative."""
    run: dict[str, Any] = yaml.safe_load(flow_config(folder).read_text())
    del run["trainer"]["default_root_dir"], run["trainer"]["callbacks"][2]["init_args"]["dirpath"]
    run["run"] |= {"dir": "outputs", "name": "run"}
    rewards = run["trainer"]["callbacks"][0]["init_args"]["rewards"]
    rewards["b"] = {"class_path": "lit_rl.rewards.client.HTTPReward", "init_args": {"outputs": ["brightness"]}}
    return run


def sharded(folder: Path) -> dict[str, Any]:
    """Flow-GRPO with a reward of its own, cut into shards where there are several processes."""
    run = flow(folder)
    run["trainer"]["callbacks"][0]["init_args"]["rewards"]["b"] = {"class_path": "ray_runs.Shipped"}
    run["trainer"]["strategy"] = FSDP2
    return run


def grpo(folder: Path) -> dict[str, Any]:
    """GRPO on a miniature language model."""
    rewards = {"odd": {"class_path": "text_runs.Odd"}}
    settings = {"prompts_per_iteration": 8, "group_size": 4, "kl": {"coef": 0.1}, "answers": {"sampling": {"max_new_tokens": 6}}}
    return text(folder, "lit_rl.methods.grpo.GRPO", settings, {"class_path": "toy_text.Digits"}, rewards)


def agent(folder: Path) -> dict[str, Any]:
    """GRPO over episodes in a world of digits."""
    episodes = {
        "worlds": {"class_path": "digit_world.DigitWorlds"},
        "codec": {"class_path": "digit_world.FirstDigit"},
        "manner": {"history": 1, "max_repeats": 0},
    }
    settings = {"prompts_per_iteration": 4, "group_size": 4, "episodes": episodes, "answers": {"sampling": {"max_new_tokens": 2}}}
    digit_tasks(folder)
    data = {"train": str(folder / "tasks.jsonl"), "val": str(folder / "tasks.jsonl")}
    return text(
        folder, "lit_rl.methods.agent_grpo.AgentGRPO", settings, {"class_path": "datamodules.agent_tasks.AgentTasks", "init_args": data}, {}
    )


def text(folder: Path, method: str, settings: dict[str, Any], data: dict[str, Any], rewards: dict[str, Any]) -> dict[str, Any]:
    policy = {"class_path": "lit_rl.policies.causal_lm.CausalLM", "init_args": {"pretrained": str(model_folder(folder / "model"))}}
    policy["init_args"]["keep_reference"] = "kl" in settings
    scoring = [{"class_path": "callbacks.reward_scoring.RewardScoring", "init_args": {"rewards": rewards}}] if rewards else []
    return {
        "seed_everything": 3,
        "run": {"dir": "outputs", "name": "run"},
        "model": {"class_path": method, "init_args": {"policy": policy, "optimizer": ADAM, **settings}},
        "data": data,
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "limit_val_batches": 0, "logger": False, "callbacks": scoring},
    }


def alone(folder: Path, run: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights at the end of the run on one process."""
    run = {**run, "trainer": {name: value for name, value in run["trainer"].items() if name != "strategy"}}
    folder.mkdir(exist_ok=True)
    (folder / "alone.yaml").write_text(yaml.safe_dump(run))
    words = (str(ROOT / "cli.py"), "fit", "--config", "alone.yaml", "--run.dir", "alone")
    script = forked_script(*words, folder=folder, environment={**os.environ, **environment, "PYTHONPATH": PATH})
    assert ended(script, timeout=300) == 0, (folder / "log").read_text()[-3000:]
    return weights(folder / "alone")


def checkpoint(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = checkpoint(folder)["state_dict"]
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of any weight."""
    assert a.keys() == b.keys() and a
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
