"""Names of earlier releases, and what they are now: a run's file of then gets a sentence with the new name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

from lit_rl.command_line.options import config_files

CONFIG_VERSION = 1
"""The version of the keys of a run's YAML. `config.yaml` of a run holds it; it rises whenever a key is renamed, with an entry below."""

MOVED = {
    "lit_rl.strategies.FSDP2Strategy": "lit_rl.strategies.fsdp2.FSDP2Strategy",
    "lit_rl.strategies.ZeroStrategy": "lit_rl.strategies.zero.ZeroStrategy",
    "lit_rl.policies.lora": "lit_rl.policies.weights.lora",
    "lit_rl.policies.pixel_vae": "lit_rl.miniatures.pixel_vae",
    "lit_rl.policies.tiny": "lit_rl.miniatures.images",
    "lit_rl.policies.tiny_lm": "lit_rl.miniatures.lm",
    "lit_rl.policies.weight_copy": "lit_rl.policies.weights.copies",
    "lit_rl.credit.Advantage": "lit_rl.credit.advantage.Advantage",
    "lit_rl.credit.rules.Advantage": "lit_rl.credit.advantage.Advantage",
    "lit_rl.credit.rules.LengthPenalty": "lit_rl.credit.length_penalty.LengthPenalty",
    "lit_rl.module": "lit_rl.modules.base",
    "lit_rl.flow_module": "lit_rl.modules.flow",
    "lit_rl.token_module": "lit_rl.modules.tokens",
    "lit_rl.policy_gradient_module": "lit_rl.modules.gradient",
    "lit_rl.decay": "lit_rl.policies.weights.decay",
    "lit_rl.advantages": "lit_rl.credit.groups",
    "lit_rl.token_advantages": "lit_rl.credit.tokens",
}
"""Dotted path of a class or module of an earlier release -> the present one."""

RENAMED: Mapping[str, str] = {
    "model.sampling": "model.init_args.answers.sampling",
    "model.eval_sampling": "model.init_args.answers.eval_sampling",
    "model.eval_seed": "model.init_args.answers.eval_seed",
    "model.engine": "model.init_args.answers.engine",
    "model.rollout_chunk": "model.init_args.answers.chunk",
    "model.old_logprobs": "model.init_args.answers.old_logprobs",
    "model.asynchronous": "model.init_args.answers.asynchronous",
    "model.clip_low": "model.init_args.surrogate.init_args.low",
    "model.clip_high": "model.init_args.surrogate.init_args.high",
    "model.dual_clip": "model.init_args.surrogate.init_args.dual",
    "model.estimator": "model.init_args.credit",
    "model.std": "model.init_args.credit",
    "model.gamma": "model.init_args.credit",
    "model.lam": "model.init_args.credit",
    "model.dynamics": "model.init_args.sde.dynamics",
    "model.noise_level": "model.init_args.sde.noise_level",
    "model.eval_num_steps": "model.init_args.evaluation.num_steps",
    "model.kl_coef": "model.init_args.kl.coef",
    "model.kl_kind": "model.init_args.kl.kind",
    "model.kl_in_reward_kind": "model.init_args.kl_in_reward.kind",
    "model.kl_target": "model.init_args.kl_in_reward.target",
    "model.kl_horizon": "model.init_args.kl_in_reward.horizon",
    "model.overlong_buffer": "model.init_args.length_penalty.buffer",
    "model.overlong_factor": "model.init_args.length_penalty.factor",
    "model.solver": "model.init_args.sampler.solver",
    "model.eta": "model.init_args.sampler.eta",
    "model.beta": "model.init_args.surrogate.init_args.beta",
    "model.adv_mode": "model.init_args.surrogate.init_args.mode",
    "model.matching_weight": "model.init_args.surrogate.init_args.weight",
    "model.power": "model.init_args.surrogate.init_args.power",
    "model.timesteps": "model.init_args.points.kind",
    "model.timestep_fraction": "model.init_args.points.fraction",
    "model.timestep_range": "model.init_args.points.range",
    "model.timestep_shift": "model.init_args.points.shift",
    "model.filter_metric": "model.init_args.dynamic_sampling.filter_metric",
    "model.max_generations": "model.init_args.dynamic_sampling.max_generations",
    "model.on_limit": "model.init_args.dynamic_sampling.on_limit",
    "model.prompts_per_generation": "model.init_args.dynamic_sampling.prompts_per_generation",
    "model.warmup_steps": "model.init_args.supervised.warmup_steps",
    "model.warmup_batch_size": "model.init_args.supervised.batch_size",
    "model.warmup_lr": "model.init_args.supervised.warmup_lr",
    "model.warmup_timesteps": "model.init_args.supervised.timesteps",
    "model.critic_lr": "model.init_args.critic_training.lr",
    "model.critic_warmup": "model.init_args.critic_training.warmup",
    "model.value_clip": "model.init_args.critic_training.value_clip",
    "model.pref_coef": "model.init_args.preference.coef",
    "model.pref_loss_kind": "model.init_args.preference.kind",
    "images_per_request": "samples_per_request",
}
"""Option of an earlier release, as `short` writes it -> its path now; a name without dots is an option of a class that stands in no
fixed place. Options that only some methods lost are listed too: what is there is never looked up."""


def moved(path: str) -> str | None:
    """The present dotted path of a class that an earlier release had at `path`."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if (new := MOVED.get(".".join(parts[:end]))) is not None:
            return ".".join([new, *parts[end:]])
    return None


def renamed(path: str) -> str | None:
    """Name the place where an option of an earlier release stands now. path: as `lit_rl.command_line.options.short` writes it."""
    for old, new in RENAMED.items():
        if path == old or path.startswith(f"{old}.") or ("." not in old and path.endswith(f".{old}")):
            return new
    return None


def other_version(argv: Sequence[str]) -> str | None:
    """The sentence for the first --config file that says it is of another version than this release reads."""
    for file in config_files(argv):
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text)
        keys = {str(key.value): value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
        stated = keys.get("config_version")
        if stated is not None and stated.value != str(CONFIG_VERSION):
            remedy = (
                "update lit-rl" if _later(stated.value) else "take its options into a YAML of this release; CHANGELOG.md has the new names"
            )
            return (
                f"{file}:{stated.start_mark.line + 1}: config_version is {stated.value}, and this release reads {CONFIG_VERSION}: {remedy}"
            )
        if stated is None and _saved_by_a_run(text):
            return (
                f"{file} was saved by a run of an earlier release: it has no config_version, and this release writes {CONFIG_VERSION}. "
                f"Start from the YAML that the run was started with, or put `config_version: {CONFIG_VERSION}` into this file and rename "
                "what is then reported; CHANGELOG.md has the new names"
            )
    return None


def _later(version: str) -> bool:
    return version.isdecimal() and int(version) > CONFIG_VERSION


def _saved_by_a_run(text: str) -> bool:
    """LightningCLI begins the files that it saves with its version."""
    return re.match(r"# lightning(\.pytorch)?==", text) is not None
