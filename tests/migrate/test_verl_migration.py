"""The commands of the platform's guide (4.1-4.4) become YAMLs that the command line takes; every key has a row on the page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_migration_llm import rows

from lit_rl.doctor.runs import parse
from lit_rl.errors import ConfigError
from lit_rl.migrate.__main__ import main
from lit_rl.migrate.verl import migrate_file, migrate_words
from lit_rl.migrate.verl_keys import KEYS, NOTHING, REFUSED, TOGETHER, literal

ROOT = Path(__file__).parents[2]
SFT = """python -m verl.trainer.sft_trainer model.partial_pretrain=/models/Qwen2.5-7B-Instruct data.train_files=/data/sft_train.parquet
    data.val_files=/data/sft_val.parquet data.prompt_key=prompt data.response_key=response data.max_length=4096 trainer.total_epochs=3
    trainer.n_gpus_per_node=8 trainer.project_name=my_sft_project trainer.experiment_name=qwen7b_sft trainer.logger='["console","wandb"]'"""
LORA = """python -m verl.trainer.sft_trainer model.partial_pretrain=/models/Qwen2.5-7B-Instruct model.lora_rank=32 model.lora_alpha=64
    model.target_modules=all-linear data.train_files=/data/sft_train.parquet trainer.total_epochs=3 trainer.n_gpus_per_node=4"""
SCRIPT = """#!/bin/bash
set -x
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=$DATA/gsm8k/train.parquet \\
    data.val_files=$DATA/gsm8k/test.parquet \\
    data.train_batch_size=1024 data.max_prompt_length=512 data.max_response_length=1024 data.filter_overlong_prompts=True \\
    data.truncation='error' actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct actor_rollout_ref.actor.optim.lr=1e-6 \\
    actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.ppo_mini_batch_size=256 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32 actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.kl_loss_type=low_var_kl \\
    actor_rollout_ref.model.enable_gradient_checkpointing=True actor_rollout_ref.rollout.tensor_model_parallel_size=2 \\
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.n=5 \\
    algorithm.use_kl_in_reward=False trainer.critic_warmup=0 trainer.logger='["console","wandb"]' \\
    trainer.project_name='verl_grpo_gsm8k' trainer.experiment_name='qwen25_7b' trainer.n_gpus_per_node=8 trainer.nnodes=1 \\
    trainer.save_freq=20 trainer.test_freq=5 trainer.total_epochs=15
"""
PPO = """python -m verl.trainer.main_ppo algorithm.adv_estimator=gae actor_rollout_ref.model.path=/models/Qwen2.5-7B-Instruct
    critic.model.path=/models/Qwen2.5-7B-Instruct data.train_files=/data/prompts.parquet data.train_batch_size=256
    actor_rollout_ref.actor.ppo_mini_batch_size=64 critic.ppo_mini_batch_size=64 algorithm.gamma=1.0 algorithm.lam=0.95
    trainer.n_gpus_per_node=8 trainer.total_epochs=10"""
DPO = """python -m verl.trainer.dpo_trainer model.path=/models/Qwen2.5-7B-Instruct data.train_files=/data/dpo_train.parquet
    data.val_files=/data/dpo_val.parquet algorithm.beta=0.1 trainer.total_epochs=1 trainer.n_gpus_per_node=8 optim.lr=5e-7"""
EXTRA = """python -m verl.trainer.main_ppo algorithm.adv_estimator=rloo +data.seed=7 actor_rollout_ref.rollout.n=8
    actor_rollout_ref.actor.policy_loss.loss_mode=gspo actor_rollout_ref.actor.clip_ratio_low=3e-4
    actor_rollout_ref.actor.clip_ratio_high=4e-4
    reward_model.path=/models/reward trainer.test_freq=-1 actor_rollout_ref.rollout.top_k=-1"""
M, P = "model.init_args.", "model.init_args.policy.init_args."
EXPECTED: list[tuple[str, str, dict[str, Any]]] = [
    (SFT, "lit_rl.methods.sft.SFT", {P + "pretrained": "/models/Qwen2.5-7B-Instruct", "data.init_args.response_key": "response",
        "trainer.max_epochs": 87, "trainer.devices": 8, "run.name": "qwen7b_sft"}),
    (LORA, "lit_rl.methods.sft.SFT", {P + "lora.rank": 32, P + "lora.alpha": 64, M + "optimizer.init_args.lr": 1e-4, "trainer.devices": 4}),
    (PPO, "lit_rl.methods.ppo.PPO", {M + "prompts_per_update": 64, M + "credit.lam": 0.95, M + "credit.gamma": 1.0,
        "trainer.max_epochs": 290, M + "critic.init_args.pretrained": "/models/Qwen2.5-7B-Instruct"}),
    (DPO, "lit_rl.methods.dpo.DPO", {M + "beta": 0.1, M + "optimizer.init_args.lr": 5e-7, "trainer.max_epochs": 437}),
    (EXTRA, "lit_rl.methods.grpo.RLOO", {M + "group_size": 8, M + "surrogate.class_path": "lit_rl.losses.surrogates.SequenceClip",
        M + "surrogate.init_args.high": 4e-4, "seed_everything": 7, "trainer.limit_val_batches": 0}),
]  # fmt: skip


def parsed(text: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The printed YAML as the command line reads it, by the command in its first lines."""
    file.write_text(text)
    command = next(line for line in text.splitlines() if "python cli.py fit" in line).split("fit ")[1]
    monkeypatch.chdir(ROOT)
    return parse(command.replace("run.yaml", str(file)).split())


def value(run: Any, key: str) -> Any:
    for part in key.split("."):
        run = run[part]
    return run


@pytest.mark.parametrize(("command", "method", "settings"), EXPECTED, ids=["sft", "lora", "ppo", "dpo", "more"])
def test_the_commands_of_the_guide(
    command: str, method: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verl", "--", *shlex.split(command)])
    run = parsed(capsys.readouterr().out, tmp_path / "run.yaml", monkeypatch)
    assert run.model.class_path == method
    assert {key: value(run, key) for key in settings} == settings


def test_the_script_of_the_guide_is_the_shipped_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What differs from configs/grpo/qwen25_7b_gsm8k.yaml is what its own words say."""
    script = tmp_path / "run_grpo.sh"
    script.write_text(SCRIPT)
    monkeypatch.setenv("DATA", "/data")
    main(["verl", str(script)])
    text = capsys.readouterr().out
    run = parsed(text, tmp_path / "run.yaml", monkeypatch)
    shipped = parse(["--config", str(ROOT / "configs/base/fsdp.yaml"), "--config", str(ROOT / "configs/grpo/qwen25_7b_gsm8k.yaml")])
    assert (run.trainer.max_epochs, run.trainer.accumulate_grad_batches) == (105, 5)
    for key in ("kl", "surrogate", "answers", "prompts_per_iteration", "prompts_per_update", "group_size", "optimizer"):
        assert run.model.init_args[key] == shipped.model.init_args[key], key
    assert run.model.init_args.policy.init_args.padding_free and run.data.init_args.train == "/data/gsm8k/train.parquet"
    assert run.trainer.logger[0].init_args.project == "verl_grpo_gsm8k" and "HTTPEngine" in text and "--tensor-parallel-size" in text


def test_epochs_are_counted_in_rows_that_are_there(tmp_path: Path) -> None:
    """10 rows, 4 in an iteration, 3 epochs: 3 x 2 iterations."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' * 10)
    words = ["verl.trainer.main_ppo", f"data.train_files={tmp_path}/rows.jsonl", "data.train_batch_size=4", "trainer.total_epochs=3"]
    made = migrate_words(words)
    assert made.settings["trainer.max_epochs"] == 6 and "3 epochs x (10 rows // 4 prompts)." in made.notes[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.train_batchsize=8"], r"key data.train_batchsize is unknown; did you mean data.train_batch_size\?"),
        (["algorithm.adv_estimator=remax"], "adv_estimator=remax has no method of this name here: choose one of gae, grpo"),
        (["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=1"], "a group of one teaches nothing"),
        (["data.train_batch_size=many"], "data.train_batch_size=many: it must be a positive whole number"),
        (["actor_rollout_ref.actor.kl_loss_type=abs"], "kl_loss_type=abs: it must be one of low_var_kl"),
        (["algorithm.rollout_correction.rollout_is=token"], "is not taken over: write model.init_args.correction"),
        (["trainer.logger=mlflow"], "trainer.logger=mlflow: there are console, wandb"),
        (["actor_rollout_ref.rollout.name=trt"], "there are vllm, sglang and hf"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov"], "loss_mode=clip_cov: there are vanilla"),
        (["~data.seed"], "'~data.seed' deletes a key of verl's own defaults"),
        (["data.seed"], "is no KEY=VALUE"),
        (["trainer.total_epochs=2.5"], r"trainer.total_epochs=2.5: it must be a positive whole number"),
        (["actor_rollout_ref.rollout.n=[4]"], r"rollout.n=\[4\]: it must be a positive whole number"),
        (["actor_rollout_ref.actor.clip_ratio=wide"], "clip_ratio=wide: it must be a number"),
    ],
)
def test_what_cannot_be_had_gets_a_sentence(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        migrate_words(["python", "-m", "verl.trainer.main_ppo", *words])


def test_other_commands_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.sh").write_text("echo hello\n")
    (tmp_path / "unknown.sh").write_text("python -m verl.trainer.main_ppo data.seed=$NOWHERE\n")
    for words, said in (
        (["verl", "--", "python", "train.py"], "it starts none of verl.trainer.sft_trainer"),
        (["verl", str(tmp_path / "empty.sh")], "no line starts verl.trainer.main_ppo"),
        (["verl", str(tmp_path / "unknown.sh")], "only running the script would tell data.seed=$NOWHERE"),
        (["verl", str(tmp_path / "gone.sh")], "no such file"),
        (["verl"], "name a file of verl"),
        (["deepgen", "--", "x"], "is read for verl alone"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err


def test_a_script_is_read_as_its_shell_does(tmp_path: Path) -> None:
    """A variable in front of the command, quotes, "+key=", lines that go on, "$@", and a log of all that it prints."""
    script = tmp_path / "run.sh"
    script.write_text(
        "TRAIN='/data/a b'\nCUDA_VISIBLE_DEVICES=$(seq -s, 0 3) python3 -m verl.trainer.main_ppo algorithm.adv_estimator=gae \\\n"
        "  +data.seed=7 data.train_files=\"['$TRAIN/1.parquet','$TRAIN/2.parquet']\" \\\n    # data.seed=8 \\\n"
        '  trainer.experiment_name=2025-07-01 data.val_files=null "$@" 2>&1 | tee run.log\n'
    )
    made = migrate_file(script)
    assert made.settings == {
        "seed_everything": 7,
        "data.init_args.train": ["/data/a b/1.parquet", "/data/a b/2.parquet"],
        "run.name": "2025-07-01",
    }
    assert "data.val_files=null is left open." in made.notes
    script.write_text("bash -c 'python3 -m verl.trainer.main_ppo data.seed=7 '\n")
    with pytest.raises(ConfigError, match=r"run.sh: the command that starts verl.trainer.main_ppo cannot be read: No closing quotation"):
        migrate_file(script)


def test_values_are_read_as_hydra_does() -> None:
    texts = ("1e-6", "8", "True", "null", '["console","wandb"]', "a-b", "/data/x.parquet")
    assert [literal(text) for text in texts] == [1e-6, 8, True, None, ["console", "wandb"], "a-b", "/data/x.parquet"]
    assert yaml.safe_load(migrate_words(["verl.trainer.main_ppo", "actor_rollout_ref.actor.optim.lr=1e-6"]).yaml("x"))["model"] == {
        "init_args": {"optimizer": {"init_args": {"lr": 1e-6}}}
    }


def test_the_command_of_the_chinese_page_is_read() -> None:
    page = (ROOT / "docs/zh/platform.md").read_text()
    command = page.split("python -m lit_rl.migrate verl -- ")[1].split(" > run.yaml")[0]
    made = migrate_words(shlex.split(command.replace("\\\n", " ")))
    assert (made.settings["trainer.max_epochs"], made.settings["trainer.devices"]) == (105, 8)
    assert all((ROOT / name).is_file() for name in re.findall(r"`(configs/[\w/]+\.yaml)`", page))


def test_every_key_has_a_row_on_the_page_and_the_page_no_other() -> None:
    page = {key for old, _, _ in rows() for key in old}
    assert page == {*KEYS, *TOGETHER, *NOTHING, *REFUSED}
