"""Keys of AReaL's guide for computer-use agents: each has its place here, and what it cannot have is told in a sentence."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rl.agents.episodes import Manner
from lit_rl.command_line.options import constructor_options, options
from lit_rl.doctor.runs import parse
from lit_rl.errors import ConfigError
from lit_rl.migrate.__main__ import main
from lit_rl.migrate.cua import CONFIG, migrate
from lit_rl.migrate.cua_keys import KEYS, NOTHING, TOGETHER
from lit_rl.rollouts.base import Sampling

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/migration_agents.md").read_text()
ROWS = [line.split("|") for line in PAGE.partition("## Keys")[2].partition("## Commands")[0].splitlines() if line.startswith("| `")]
WHOLE = """
model:
  name: Qwen/Qwen3-VL-32B-Instruct
  max_seq_length: 16384
  torch_dtype: bfloat16
  trust_remote_code: true
  use_lora: true
  lora: {r: 8, alpha: 32, dropout: 0.0, target_modules: [q_proj, v_proj], bias: none, task_type: CAUSAL_LM}
training:
  {learning_rate: 1e-5, weight_decay: 0.01, max_grad_norm: 1.0, batch_size: 4, gradient_accumulation_steps: 4, max_steps: 100,
   warmup_steps: 10, eval_steps: 5, save_steps: 20, save_total_limit: 3, load_best_model_at_end: true, metric_for_best_model: eval/accuracy,
   greater_is_better: true, early_stopping_patience: 2, target_accuracy: 0.8, output_dir: outputs/mine, seed: 7}
grpo: {beta: 0.02, clip_epsilon: 0.3, min_group_std: 0.05, advantage_normalization: false}
rollout:
  num_rollouts: 8
  max_turns: 10
  concurrency: 2
  async_mode: true
  interruptible: true
  max_staleness: 5
  enable_temperature_variation: false
  base_temperature: 0.6
  temperature_increment: 0.1
  gbox: {box_type: linux, timeout: 90s, expires_in: 20m}
  action_delay: 1
  screenshot_delay: 0.5
inference:
  backend: vllm
  vllm: {api_base: "http://localhost:8000/v1", max_tokens: 1024, temperature: 0.9, top_p: 0.9, timeout: 300.0, max_retries: 1}
distributed: {backend: fsdp, fsdp: {sharding_strategy: FULL_SHARD, mixed_precision: bf16, gradient_clipping: 0.5, cpu_offload: false}}
logging: {level: debug, log_to_file: true, log_file: logs/train.log, enable_detailed_logging: false, detailed_log_file: logs/rollouts.log}
monitoring: {enable_wandb: true, wandb_project: cua-grpo, wandb_entity: null, enable_tensorboard: true}
checkpoint: {resume_from_checkpoint: outputs/mine/checkpoints/checkpoint-50, ignore_data_skip: false}
"""


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key of the run that a YAML of theirs is laid over."""
    words = [word for file in ("configs/base/fsdp.yaml", CONFIG) for word in ("--config", str(ROOT / file))]
    found = [*options(words), *constructor_options(ModelCheckpoint, "run.callbacks.newest")]
    parts = {"episodes.manner": Manner, "answers.sampling": Sampling}
    return {o.path for o in found} | {f"model.init_args.{name}.{field.name}" for name, part in parts.items() for field in fields(part)}


def test_every_key_is_known_and_on_the_page() -> None:
    theirs = sorted({*KEYS, *NOTHING, *TOGETHER})
    assert len(theirs) == len(KEYS) + len(NOTHING) + len(TOGETHER)
    assert sorted(row[1].strip(" `") for row in ROWS) == theirs


def test_every_key_of_the_page_exists(keys: set[str]) -> None:
    for row in ROWS:
        named = re.findall(r"`([a-z_]+(?:\.\w+)+|seed_everything)`", row[2])
        assert [key for key in named if key not in keys] == [], row[1]
        assert named or len(row[3].strip()) > 5, row[1]
        assert [file for file in re.findall(r"configs/[\w/]+\.yaml", row[3]) if not (ROOT / file).is_file()] == []


def test_a_whole_file_becomes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All keys, on two GPUs; the command that is printed parses, and holds their values."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("VLLM_API_BASE", raising=False)
    (tmp_path / "cua_grpo.yaml").write_text(WHOLE)
    main(["cua", str(tmp_path / "cua_grpo.yaml"), "--gpus", "2"])
    (tmp_path / "run.yaml").write_text(made := capsys.readouterr().out)
    command = next(line for line in made.splitlines() if "python cli.py fit" in line).split("fit ")[1]
    run = parse(command.replace("run.yaml", str(tmp_path / "run.yaml")).split())
    model, policy = run.model.init_args, run.model.init_args.policy.init_args
    assert (policy.lora.rank, policy.lora.alpha, policy.lora.targets) == (8, 32.0, ["q_proj", "v_proj"])
    assert (model.prompts_per_iteration, model.group_size, run.trainer.devices, run.trainer.max_epochs) == (8, 8, 2, 100)
    assert (model.optimizer.init_args.lr, run.seed_everything, run.run.dir, run.run.name) == (1e-5, 7, "outputs", "mine")
    assert (model.kl.coef, model.surrogate.init_args.high, model.credit.init_args.std) == (0.02, 0.3, False)
    assert (model.episodes.manner.max_prompt_tokens, model.answers.sampling.max_new_tokens) == (16384 - 1024, 1024)
    assert (model.answers.sampling.temperature, model.answers.sampling.top_p, model.answers.engine.init_args.urls) == (0.9, 1.0, None)
    assert (model.answers.engine.init_args.deadline_s, run.trainer.gradient_clip_val) == (600.0, 0.5)
    worlds = model.episodes.worlds.init_args
    assert (worlds.box_type, worlds.create_timeout, worlds.expires_in, worlds.screenshot_delay) == ("linux", "90s", "20m", 0.5)
    callbacks = {c.class_path.rpartition(".")[2]: c.init_args for c in run.trainer.callbacks}
    logs, early = callbacks["AgentLogs"], callbacks["EarlyStopping"]
    assert (logs.training, logs.rollouts, logs.level, logs.folder) == ("train.log", None, "DEBUG", "outputs/mine/logs")
    assert (early.patience, early.stopping_threshold, callbacks["BestModel"].monitor, callbacks["Export"].keep) == (
        2,
        0.8,
        "val/accuracy",
        3,
    )
    assert [logger.class_path.rpartition(".")[2] for logger in run.trainer.logger] == ["WandB", "TensorBoardLogger"]
    assert "continue with --ckpt_path outputs/mine/checkpoints/checkpoint-50" in made and "top_p: 0.9 is left out" in made


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("training: {lerning_rate: 1}", ":1: key training.lerning_rate is unknown; did you mean training.learning_rate?"),
        ("a: 1\nmodel:\n  name: x", ":1: key a is unknown"),
        ("model:\n  lora: {rank: 8}", ":2: key model.lora.rank is unknown"),
        ("model: 3", ":1: key model is unknown"),
        ("training: {max_steps: many}", ":1: training.max_steps: many: it must be a positive whole number"),
        ("training: {learning_rate: fast}", "training.learning_rate: fast: it must be a number"),
        ("model:\n  lora:\n    dropout: 0.1", ":3: model.lora.dropout: 0.1: it must be 0: with dropout the policy that trains is not"),
        ("rollout: {enable_temperature_variation: sometimes}", "it must be true or false"),
        ("inference: {backend: tgi}", "inference.backend: tgi: it must be one of vllm, sglang"),
        ("distributed: {fsdp: {sharding_strategy: HYBRID_SHARD}}", "it must be one of FULL_SHARD, SHARD_GRAD_OP, NO_SHARD"),
        ("checkpoint: {ignore_data_skip: true}", "it must be false: a run that is continued goes on with the tasks where it stopped"),
        ("model: {max_seq_length: 2048}", "model.max_seq_length: 2048: it leaves no room for a prompt"),
        ("logging: {level: loud}", "logging.level: loud: it must be one of DEBUG, INFO, WARNING, ERROR"),
        ("training: {metric_for_best_model: eval/loss}", "it must be one of eval/accuracy, eval/reward, eval/turns"),
        ("inference: {backend: [vllm]}", ":1: inference.backend: ['vllm']: it must be one of vllm, sglang"),
        ("training:\n  early_stopping_patience: [3]", ":2: training.early_stopping_patience: [3]: it must be a positive whole number"),
        ("monitoring: {enable_wandb: {}}", ":1: monitoring.enable_wandb: {}: it must be true or false"),
        ("training: {seed: !mine 3}", "this is not YAML: could not determine a constructor for the tag '!mine'"),
        ("", "this is no run"),
        ("# nothing", "this is no run"),
        ("- 1", "this is no run"),
        ("{", "this is not YAML"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "cua.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        migrate(tmp_path / "cua.yaml", gpus=4)


def test_the_gpus_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gpus N is missing: batch_size of that YAML counts tasks per GPU"):
        migrate(tmp_path / "cua.yaml", gpus=None)


@pytest.mark.parametrize(
    ("text", "base", "settings"),
    [
        ("distributed: {backend: ddp}", "ddp", {}),
        ("distributed: {fsdp: {sharding_strategy: SHARD_GRAD_OP}}", "deepspeed_zero2", {}),
        ("distributed: {fsdp: {cpu_offload: true}}", "deepspeed_zero3_offload", {}),
        ("model: {use_lora: false, lora: {r: 8}}", "fsdp", {"lora": None, "keep_reference": True}),
        ("inference: {vllm: {api_base: 'http://gpu7:8000/v1'}}", "fsdp", {"urls": "http://gpu7:8000/v1"}),
        ("monitoring: {enable_wandb: null, wandb_entity: ''}\ntraining: {greater_is_better: null}", "fsdp", {}),
        ("training: {warmup_steps: 0}", "fsdp", {"lr_scheduler": None}),
        ("rollout: {enable_temperature_variation: true}", "fsdp", {"temperature": 0.6, "temperature_increment": 0.1}),
        (
            "rollout: {enable_temperature_variation: true, base_temperature: 0.8}\ninference: {vllm: {temperature: 0.9}}",
            "fsdp",
            {"temperature": 0.8, "temperature_increment": 0.1},
        ),
    ],
)
def test_choices_between_files_and_classes(text: str, base: str, settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cua.yaml").write_text(text)
    made = migrate(tmp_path / "cua.yaml", gpus=4)
    assert made.bases == [f"configs/base/{base}.yaml", CONFIG] and yaml.safe_load(made.yaml("cua.yaml"))["trainer"]["devices"] == 4
    assert {key.rpartition(".")[2]: value for key, value in made.settings.items() if key != "trainer.devices"} == settings
