"""verl's command lines (Hydra overrides behind `python -m verl.trainer...`), as the training platform's guide has them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lit_rl.errors import ConfigError
from lit_rl.migrate.migrated import Migrated
from lit_rl.migrate.shell import command, expanded
from lit_rl.migrate.values import Settings
from lit_rl.migrate.verl_keys import ACTOR, ESTIMATORS, KEYS, MODEL, NOTHING, POLICY, ROLLOUT, SURROGATES, TOGETHER, Given, overrides

PROGRAMS = {"sft_trainer": "sft", "fsdp_sft_trainer": "sft", "main_ppo": "ppo", "dpo_trainer": "dpo"}
ROWS = {"sft": 7473, "ppo": 7473, "dpo": 112052}
"""Rows of the data of the guide's runs, GSM8K and full-hh-rlhf, for files that are not on this machine."""
BASES = {"sft": "configs/sft/qwen25_7b_gsm8k.yaml", "dpo": "configs/dpo/qwen25_7b_hh_rlhf.yaml"}
RATES = {"sft": 1e-4, "ppo": 1e-5, "dpo": 5e-6}
"""Learning rates of adapters, where the command names none."""


def migrate_file(file: Path) -> Migrated:
    """Read a script that starts verl. Raises ConfigError where no line does, or where only running it would tell a value."""
    if not file.is_file():
        raise ConfigError(
            f"no such file: {file}; a command line stands behind --: python -m lit_rl.migrate verl -- python -m verl.trainer..."
        )
    words, known = command(file, r"(?:\S*/)?verl[./]trainer[./]\w+", names="verl.trainer.main_ppo, sft_trainer or dpo_trainer")
    found = []
    for word in words:
        if (value := expanded(word, known)) is None:
            raise ConfigError(f"{file}: only running the script would tell {word}: write its value there")
        found.append(value)
    return migrate_words(found, place=str(file))


def migrate_words(words: Sequence[str], *, place: str = "the command") -> Migrated:
    """The run of a command line. Raises ConfigError that names key, value and what to do."""
    where = next((i for i, word in enumerate(words) if "verl.trainer." in word or "verl/trainer/" in word), None)
    program = "" if where is None else re.split(r"[./]", words[where].removesuffix(".py"))[-1]
    if where is None or program not in PROGRAMS:
        raise ConfigError(f"{place}: it starts none of verl.trainer.{', verl.trainer.'.join(PROGRAMS)}")
    stated = overrides([word for word in words[where + 1 :] if word != "..."], place=place)
    given = {key: value for key, value in stated.items() if value is not None}
    kind = PROGRAMS[program]
    made = Migrated(bases=_bases(given, kind, place))
    made.take({**KEYS, **TOGETHER}, given, told=lambda key: f"{place}: {key}={given[key]}")
    made.note(NOTHING, given)
    for part in (_adapter, _sizes, _divergence, _credit, _surrogate, _rewards, _engine, _trackers):
        part(made, given, kind)
    made.notes += [f"{key}=null is left open." for key in stated if key not in given]
    made.notes.append(f"What the command leaves open is as in {made.bases[1]}.")
    return made


def _bases(given: Mapping[str, object], kind: str, place: str) -> list[str]:
    strategy = (
        "configs/base/deepspeed_zero3_offload.yaml" if given.get(f"{ACTOR}.fsdp_config.param_offload") is True else "configs/base/fsdp.yaml"
    )
    adapted = ["configs/base/lora.yaml"] if given.get("model.lora_rank") else []
    if adapted and not given.get(f"{ACTOR}.fsdp_config.param_offload"):
        strategy = "configs/base/ddp.yaml"
    if kind in BASES:
        return [strategy, BASES[kind], *adapted]
    estimator = given.get("algorithm.adv_estimator", "gae")
    if estimator not in ESTIMATORS:
        raise ConfigError(
            f"{place}: algorithm.adv_estimator={estimator} has no method of this name here: choose one of {', '.join(ESTIMATORS)}, or see "
            "docs/methods.md"
        )
    return [strategy, ESTIMATORS[str(estimator)][0], *adapted]


def _adapter(made: Migrated, given: Given, kind: str) -> None:
    if not given.get("model.lora_rank"):
        for key in [key for key in made.settings if key.startswith(f"{POLICY}.lora.")]:
            del made.settings[key]
        return
    made.settings[f"{POLICY}.lora.rank"] = given["model.lora_rank"]
    if not {"optim.lr", f"{ACTOR}.optim.lr"} & given.keys():
        made.settings[f"{MODEL}.optimizer.init_args.lr"] = RATES[kind]
        if kind == "sft":
            made.settings[f"{MODEL}.lr_scheduler.init_args.max_lr"] = RATES[kind]


def _rows(given: Given, kind: str) -> tuple[int, bool]:
    """The rows of the training data, and whether they were counted."""
    files = given.get("data.train_files")
    places = [Path(str(file)).expanduser() for file in (files if isinstance(files, list) else [files])]
    if not all(place.is_file() and place.suffix in (".parquet", ".jsonl") for place in places):
        return ROWS[kind], False
    import pyarrow.parquet as parquet

    counts = [parquet.read_metadata(place).num_rows if place.suffix == ".parquet" else _lines(place) for place in places]
    return sum(counts), True


def _lines(file: Path) -> int:
    with open(file, "rb") as stream:
        return sum(1 for line in stream if line.strip())


def _sizes(made: Migrated, given: Given, kind: str) -> None:
    """Iterations of epochs, and micro-batches."""
    prompts = int(str(given.get("data.train_batch_size", 1024 if "grpo" in made.bases[1] else 256)))
    answers = int(str(given.get(f"{ROLLOUT}.n", 5 if "grpo" in made.bases[1] else 1)))
    if kind == "ppo" and f"{ROLLOUT}.n" in given:
        if "grpo" in made.bases[1] and answers < 2:
            raise ConfigError(f"{ROLLOUT}.n={answers}: a group of one teaches nothing, set 2 or more")
        made.settings[f"{MODEL}.group_size"] = answers
    if "trainer.total_epochs" in given:
        rows, counted = _rows(given, kind)
        made.settings["trainer.max_epochs"] = iterations = max(1, int(str(given["trainer.total_epochs"])) * (rows // prompts))
        if kind == "sft":
            made.settings[f"{MODEL}.lr_scheduler.init_args.total_steps"] = iterations + 1
        guessed = "" if counted else ", if they are the guide's: write your own file's number"
        made.notes.append(f"trainer.max_epochs: {given['trainer.total_epochs']} epochs x ({rows} rows // {prompts} prompts){guessed}.")
    if f"{ACTOR}.ppo_micro_batch_size_per_gpu" in given:
        update = int(str(given.get(f"{ACTOR}.ppo_mini_batch_size", 256 if "grpo" in made.bases[1] else 64)))
        gpus = int(str(given.get("trainer.n_gpus_per_node", 8))) * int(str(given.get("trainer.nnodes", 1)))
        micro = int(str(given[f"{ACTOR}.ppo_micro_batch_size_per_gpu"]))
        made.settings["trainer.accumulate_grad_batches"] = max(1, math.ceil(update * answers / gpus / micro))


def _divergence(made: Migrated, given: Given, kind: str) -> None:
    if kind != "ppo":
        return
    uses, in_reward = given.get(f"{ACTOR}.use_kl_loss"), given.get("algorithm.use_kl_in_reward") is True
    if uses is not None:
        made.settings[f"{MODEL}.kl.coef"] = given.get(f"{ACTOR}.kl_loss_coef", 0.001) if uses is True else 0.0
    if in_reward:
        made.settings[f"{MODEL}.kl_in_reward.coef"] = given.get("algorithm.kl_ctrl.kl_coef", 0.001)
    if uses is not None or in_reward:
        made.settings[f"{POLICY}.keep_reference"] = (uses is True or in_reward) and not given.get("model.lora_rank")


def _credit(made: Migrated, given: Given, kind: str) -> None:
    estimator = str(given.get("algorithm.adv_estimator", "gae"))
    if kind != "ppo":
        return
    if ESTIMATORS[estimator][1]:
        made.settings["model.class_path"] = ESTIMATORS[estimator][1]
    if estimator != "gae":
        for key in ("algorithm.gamma", "algorithm.lam"):
            if key in given:
                made.notes.append(f"{key}: of no use to {estimator}, in verl too.")
        for key in [key for key in made.settings if key.startswith((f"{MODEL}.credit.lam", f"{MODEL}.critic"))]:
            del made.settings[key]
    elif "algorithm.gamma" in given:
        made.settings[f"{MODEL}.credit.gamma"] = given["algorithm.gamma"]
    if estimator == "grpo" and "algorithm.norm_adv_by_std_in_grpo" in given:
        std = given["algorithm.norm_adv_by_std_in_grpo"] is True
        made.settings[f"{MODEL}.credit"] = {"class_path": "lit_rl.credit.rules.Group", "init_args": {"std": std}}


def _surrogate(made: Migrated, given: Given, kind: str) -> None:
    mode = str(given.get(f"{ACTOR}.policy_loss.loss_mode", "vanilla"))
    if mode not in SURROGATES:
        raise ConfigError(f"{ACTOR}.policy_loss.loss_mode={mode}: there are {', '.join(SURROGATES)}")
    options: Settings = {}
    for name, side in (("clip_ratio", ("low", "high")), ("clip_ratio_low", ("low",)), ("clip_ratio_high", ("high",))):
        options |= {one: given[f"{ACTOR}.{name}"] for one in side if f"{ACTOR}.{name}" in given}
    if f"{ACTOR}.clip_ratio_c" in given and mode == "vanilla":
        options["dual"] = given[f"{ACTOR}.clip_ratio_c"]
    if mode != "vanilla":
        kept = {"gpg": set[str](), "sapo": set[str](), "cispo": {"low", "high"}}.get(mode, {"low", "high"})
        options = {name: value for name, value in options.items() if name in kept}
        made.settings[f"{MODEL}.surrogate"] = {"class_path": f"lit_rl.losses.surrogates.{SURROGATES[mode]}", "init_args": options}
    elif kind == "ppo":
        made.settings |= {f"{MODEL}.surrogate.init_args.{name}": value for name, value in options.items()}


def _rewards(made: Migrated, given: Given, kind: str) -> None:
    path, function = given.get("reward_model.path"), given.get("custom_reward_function.path")
    if path is None and function is None:
        return
    text = "lit_rl.rewards.text"
    reward: Settings = {"class_path": f"{text}.model.ModelReward", "init_args": {"pretrained": path}}
    weights = {"reward_model": 1.0}
    if function is not None:
        named = given.get("custom_reward_function.name", "compute_score")
        reward = {"class_path": f"{text}.function.FunctionReward", "init_args": {"path": function, "function": named}}
        weights = {"score": 1.0}
    scoring = {"class_path": "callbacks.reward_scoring.RewardScoring", "init_args": {"rewards": {"verl": reward}, "weights": weights}}
    made.settings["trainer.callbacks"] = [scoring, {"class_path": "callbacks.export.Export", "init_args": {"every_n_epochs": 20}}]


def _engine(made: Migrated, given: Given, kind: str) -> None:
    name = given.get(f"{ROLLOUT}.name")
    if name == "hf":
        made.settings[f"{MODEL}.answers.engine"] = {"class_path": "lit_rl.rollouts.hf.HFEngine"}
    elif name in ("vllm", "sglang"):
        made.notes.append(
            f"{ROLLOUT}.name={name}: answers come from the training process until model.init_args.answers.engine names a server of yours "
            "(lit_rl.rollouts.http.HTTPEngine: docs/methods.md)."
        )
    elif name is not None:
        raise ConfigError(f"{ROLLOUT}.name={name}: there are vllm, sglang and hf")


def _trackers(made: Migrated, given: Given, kind: str) -> None:
    named = given.get("trainer.logger")
    if named is None:
        return
    names = [str(name) for name in (named if isinstance(named, list) else [named])]
    project, run = given.get("trainer.project_name", "lit_rl"), given.get("trainer.experiment_name")
    about: Settings = {"project": project} | ({"name": run} if run else {})
    makers: Mapping[str, Callable[[], Settings]] = {
        "wandb": lambda: {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": about},
        "tensorboard": lambda: {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "outputs"}},
    }
    if odd := [name for name in names if name not in makers and name != "console"]:
        raise ConfigError(
            f"trainer.logger={odd[0]}: there are console, {', '.join(makers)}; another one is a logger of Lightning in trainer.logger"
        )
    if loggers := [makers[name]() for name in names if name in makers]:
        made.settings["trainer.logger"] = loggers
    if "console" in names:
        made.settings["run.callbacks.progress.line"] = "step"
