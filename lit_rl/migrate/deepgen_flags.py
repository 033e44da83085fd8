"""Options of DeepGen-RL's trainer (`deepgen_rl.grpo_deepgen`) and keys of a run's YAML. docs/migration_deepgen.md has a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lit_rl.errors import ConfigError
from lit_rl.migrate.values import Keys, Settings, checked, count, number, one_of, real, same, text, whole

Given = Mapping[str, str]
"""The options of a command line by name; those that are not given are not in it."""

MODEL, POLICY = "model.init_args", "model.init_args.policy.init_args"
BASES = {"flowgrpo": "flow_grpo", "grpoguard": "grpo_guard", "diffusionnft": "diffusion_nft"}
"""Config in configs/deepgen by `--atrain_algorithm`."""
DEEPSPEED = {"zero2.json", "zero3.json", "zero3_offload.json", "zero3_sd3.json"}
TRACKERS = {
    "wandb": "callbacks.trackers.WandB",
    "swanlab": "callbacks.trackers.SwanLab",
    "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
}
ADVANTAGES: Mapping[str, Settings] = {
    "gdpo": {"kind": "gdpo", "ddof": 1},
    "grpo": {"kind": "sum", "std": "group", "ddof": 1},
    "grpo_global_std": {"kind": "sum", "std": "batch", "ddof": 1},
    "reinforcepp": {"kind": "reinforce", "ddof": 1},
}
SAMPLERS = {"cps_sde": "cps", "flowgrpo_sde": "flow_sde", "dance_sde": "dance_sde"}
REMOVED = {
    "num_generations": "rollout_n",
    "per_device_train_batch_size": "rollout_micro_batch_size and atrain_micro_batch_size",
    "gradient_accumulation_steps": "rollout_global_batch_size and atrain_global_batch_size",
}
"""Options that the trainer itself refuses, and what it names in their place."""


def _schedule(value: object) -> Settings:
    if value not in ("constant", "constant_with_warmup"):
        raise ValueError(
            "constant or constant_with_warmup; for another name a scheduler of torch in model.init_args.lr_scheduler, such as "
            "torch.optim.lr_scheduler.CosineAnnealingLR"
        )
    if value == "constant":
        return {f"{MODEL}.lr_scheduler": None}
    return {f"{MODEL}.lr_scheduler.class_path": "lit_rl.modules.learning_rates.ConstantWithWarmup"}


def _ends(value: object) -> Settings:
    return {"trainer.max_epochs": steps} if (steps := whole(value)) > 0 else {}


def _divergence(value: object) -> Settings:
    without: Settings = {f"{POLICY}.keep_reference": False} if real(value) == 0 else {}
    return {f"{MODEL}.kl.coef": number(value), **without}


def _guidance(value: object) -> Settings:
    return {f"{POLICY}.guidance_scale": scale if (scale := real(value)) > 0 else 1.0}


def _pictures(value: object) -> Settings:
    return {"run.callbacks.samples.every_n_iterations": every} if (every := whole(value)) else {"run.callbacks.samples": None}


def _strategy(value: object) -> Settings:
    if Path(text(value)).name in DEEPSPEED:
        return {}  # a base
    return {"trainer.strategy": {"class_path": "lit_rl.strategies.zero.ZeroStrategy", "init_args": {"config": value}}}


def _trackers(value: object) -> Settings:
    names = [name for name in text(value).replace(" ", ",").split(",") if name and name != "none"]
    if odd := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"{', '.join(TRACKERS)} or none; {odd[0]}: a logger of Lightning in trainer.logger")
    where: Settings = {"init_args": {"save_dir": "outputs", "name": "logs"}}
    return {"trainer.logger": [{"class_path": TRACKERS[n]} | (where if n == "tensorboard" else {}) for n in names] or False}


def _evaluations(value: object) -> Settings:
    return {"trainer.check_val_every_n_epoch": every} if (every := whole(value)) else {"trainer.limit_val_batches": 0}


def _auxiliary(value: object) -> Settings:
    return {f"{MODEL}.supervised.coef": number(value)} if real(value) else {f"{MODEL}.supervised": None}


FLAGS: Keys = {
    "checkpoint": same(f"{POLICY}.checkpoint", text),
    "output_dir": same("run.dir", text),
    "learning_rate": same(f"{MODEL}.optimizer.init_args.lr"),
    "lr_scheduler_type": _schedule,
    "warmup_steps": same(f"{MODEL}.lr_scheduler.init_args.warmup_steps"),
    "logging_steps": same("trainer.log_every_n_steps"),
    "save_steps": same("run.callbacks.newest.every_n_epochs"),
    "save_total_limit": same("run.callbacks.newest.save_top_k"),
    "max_steps": _ends,
    "bf16": lambda _: {"trainer.precision": "bf16-mixed", f"{POLICY}.dtype": "bfloat16"},
    "rollout_n": same(f"{MODEL}.group_size"),
    "rollout_micro_batch_size": same(f"{MODEL}.rollout_micro_batch"),
    "atrain_micro_batch_size": same(f"{MODEL}.train_micro_batch"),
    "atrain_num_actor_update_steps": same(f"{MODEL}.updates_per_iteration"),
    "beta": _divergence,
    "cfg_scale": _guidance,
    "num_inference_steps": same(f"{MODEL}.num_steps"),
    "log_images_interval": _pictures,
    "prompts_file": same("data.init_args.train", text),
    "dataset_config": same("data.init_args.train", text),
    "report_to": _trackers,
    "run_name": same("run.name", text),
    "deepspeed": _strategy,
    "gradient_checkpointing": lambda _: {f"{POLICY}.gradient_checkpointing": True},
    "max_grad_norm": same("trainer.gradient_clip_val"),
    "init_same_noise": lambda _: {f"{MODEL}.sde.same_latent": True},
    "timestep_fraction": same(f"{MODEL}.timestep_fraction"),
    "clip_range": lambda value: {f"{MODEL}.surrogate.init_args.{side}": number(value) for side in ("low", "high")},
    "sde_eta": same(f"{MODEL}.sde.noise_level"),
    "atrain_algorithm": checked(one_of(BASES)),
    "atrain_nft_beta": same(f"{MODEL}.surrogate.init_args.beta"),
    "atrain_nft_adv_clip_range": same(f"{MODEL}.advantage.clip"),
    "atrain_sde_sampler": same(f"{MODEL}.sde.dynamics", one_of(SAMPLERS)),
    "atrain_adv_type": same(f"{MODEL}.advantage", one_of(ADVANTAGES)),
    "sftaux_dataset_config": same(f"{MODEL}.supervised.data.init_args.sources", text),
    "sftaux_coef": _auxiliary,
    "sftaux_every_n_steps": same(f"{MODEL}.supervised.every"),
    "eval_freq": _evaluations,
    "eval_cfg_scale": same(f"{MODEL}.evaluation.guidance_scale"),
    "eval_num_inference_steps": same(f"{MODEL}.evaluation.num_steps"),
}
"""One option by itself. Those that belong together are in `together`."""

NOTHING = {
    "model_config": "the policy builds the model from its three paths",
    "dataloader_num_workers": "prompts are read once",
    "log_prob_micro_batch_size": "it had no effect",
    "log_component_grad_norm": "the gradient's norm is logged as one number",
    "log_component_grad_norm_every": "the gradient's norm is logged as one number",
    "log_tflops": "it had no effect; run.callbacks.throughput says where the time goes",
    "log_tflops_every": "it had no effect; run.callbacks.throughput says where the time goes",
    "log_tflops_warmup_steps": "it had no effect; run.callbacks.throughput says where the time goes",
    "local_rank": "torchrun or Lightning sets it",
}
"""Options without a key here, and why nothing is lost."""


_SAMPLER = "sde: {dynamics: cps, noise_level: 1.0} of callbacks.evaluation_sets.EvaluationSets in trainer.callbacks"
OTHERS = {
    "num_train_epochs": "trainer.max_epochs counts rollouts: epochs x rows of the training data / prompts of a rollout",
    "reward_funcs": "the rewards are those of callbacks.reward_scoring.RewardScoring in the config: change them there",
    "dataset_config": "python -m lit_rl.migrate deepgen FILE checks it, and prints the rewards that its rows name",
    "eval_dataset_config": "export EVAL_DATASET_CONFIG=FILE before the run; python -m lit_rl.migrate deepgen FILE checks it",
    "eval_before_train": "python cli.py validate with the same files, before fit",
    "eval_inference_mode": f"{_SAMPLER}; without it images are those of the ODE",
    "eval_sde_eta": f"noise_level of {_SAMPLER}",
    "eval_image_height": "evaluation renders in the size of training",
    "eval_image_width": "evaluation renders in the size of training",
    "eval_micro_batch_size": "data.init_args.eval_batch_size, which one GPU renders at a time",
    "eval_wandb_num_upload_images": "trackers show the same images: max_images of the evaluation's callback",
    "eval_swanlab_num_upload_images": "trackers show the same images: max_images of the evaluation's callback",
    "ema_diffusion": "callbacks.ema.EMA in trainer.callbacks, with this decay; the trainer's own had no effect",
    "atrain_nft_off_policy": "decay of callbacks.old_policy.OldPolicySync in the config: copy is on-policy",
    "sftaux_micro_batch_size": "model.init_args.supervised.batch_size is this times the GPUs",
    "sftaux_num_workers": "pictures are read when they are asked for",
    "sftaux_disable_on_error": "a picture that cannot be read ends the run with its name",
    "rollout_global_batch_size": "prompts_per_iteration x group_size",
    "atrain_global_batch_size": "the rollout / updates_per_iteration",
    "image_height": "policy.resolution: [height, width]",
    "image_width": "policy.resolution: [height, width]",
    "atrain_kl_type": "kl.kind",
}
"""Options that several keys, other files or a person decide."""
SIZES = {"rollout_n": 8, "rollout_global_batch_size": 256, "atrain_global_batch_size": 256, "atrain_num_actor_update_steps": 1}
"""Options that `together` reads, and their defaults."""
SCRIPT_VARIABLES: Mapping[str, tuple[tuple[str, ...], Callable[[object], Settings]]] = {
    "ATRAIN_ADV_CLIP_MAX": (("flowgrpo", "grpoguard"), same(f"{MODEL}.advantage.clip")),
    "ATRAIN_INCLUDE_LAST_DENOISE_STEP": (("flowgrpo", "grpoguard"), lambda value: {f"{MODEL}.last_step": value == "1"}),
    "ATRAIN_GRPOGUARD_HIGHCLIP_RANGE": (("grpoguard",), same(f"{MODEL}.surrogate.init_args.high")),
    "ATRAIN_NFT_BETA": (("diffusionnft",), same(f"{MODEL}.surrogate.init_args.beta")),
    "ATRAIN_NFT_ADV_CLIP_RANGE": (("diffusionnft",), same(f"{MODEL}.advantage.clip")),
}
"""Variables of a launch script that have keys here, and the algorithms that read them. They beat options there."""
COUNTS: Keys = dict.fromkeys((*SIZES, "atrain_micro_batch_size", "sftaux_micro_batch_size", "image_height", "image_width"), checked(count))
"""Options that are counted with."""


def accumulation(*, images: int | None, micro: int, processes: int) -> int:
    """Micro-batches of a training step on each process: images / (micro x processes); 1 where the images are not given.

    Raises ConfigError where that is no whole number, as the trainer does.
    """
    if images is None:
        return 1
    if images % (micro * processes):
        raise ConfigError(f"--atrain_global_batch_size {images} is no multiple of --atrain_micro_batch_size {micro} x {processes} GPUs")
    return images // (micro * processes)


def together(given: Given, algorithm: str) -> Settings:
    """Keys that several options decide: sizes of batches and pictures, the divergence, what is kept of an old policy."""
    found: Settings = {}
    size = {name: int(given.get(name, value)) for name, value in SIZES.items()}
    rollout, updates = size["rollout_global_batch_size"], size["atrain_num_actor_update_steps"]
    if rollout % size["rollout_n"]:
        raise ConfigError(f"--rollout_global_batch_size {rollout} is no multiple of --rollout_n {size['rollout_n']}: groups stay whole")
    if size["atrain_global_batch_size"] * updates != rollout:
        trained = size["atrain_global_batch_size"]
        raise ConfigError(
            f"--atrain_global_batch_size {trained} x --atrain_num_actor_update_steps {updates} is not --rollout_global_batch_size "
            f"{rollout}: here a rollout is trained on whole; set the latter to {trained * updates}"
        )
    if {"rollout_n", "rollout_global_batch_size"} & given.keys():
        found[f"{MODEL}.prompts_per_iteration"] = rollout // size["rollout_n"]
    if {"image_height", "image_width"} & given.keys():
        found[f"{POLICY}.resolution"] = [int(given.get(name, "512")) for name in ("image_height", "image_width")]
    if algorithm != "diffusionnft" and {"atrain_sde_sampler", "atrain_kl_type"} & given.keys():
        of_v = given.get("atrain_kl_type", "v-based") == "v-based"
        noise = "diffusion" if given.get("atrain_sde_sampler") == "flowgrpo_sde" else "noise_std"
        found[f"{MODEL}.kl.kind"] = f"{'v' if of_v else 'x'}_{noise}"
    return found
