"""DeepGen-RL's data files: which prompts and rewards train, what evaluates, and which pictures SFT-aux imitates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from datamodules.deepgen_sources import python_sources
from lit_rl.errors import ConfigError
from lit_rl.migrate.migrated import Migrated, unknown

MODES = ("sample_proportional", "weight_only")
TRAINING = ("name", "path", "sample_weight", "rewards")
EVALUATION = ("name", "path", "cfg_scale", "num_inference_steps", "duplicates", "scoring")
PROMPTS, ROWS = (".txt", ".jsonl", ".parquet"), (".csv", ".txt", ".jsonl", ".parquet")
CONFIGS = ["configs/base/deepspeed_zero2.yaml", "configs/deepgen/flow_grpo.yaml"]
EVALUATION_SETS = "callbacks.evaluation_sets.EvaluationSets"
JUDGES = "lit_rl.rewards.judges"
REWARDS: Mapping[str, dict[str, object]] = {
    "unifiedreward_think": {"class_path": f"{JUDGES}.pairwise.UnifiedRewardThink"},
    "unifiedreward": {"class_path": f"{JUDGES}.pointwise.UnifiedReward"},
    "ocr_vllm": {"class_path": f"{JUDGES}.pointwise.VLMReader"},
    "clip_sim": {"class_path": "lit_rl.rewards.clip.CLIPSimilarity"},
}
"""Rewards of the same name and meaning here."""
SERVED = ("ocr", "pickscore", "deqa", "image_reward", "aesthetic", "hps", "unifiedreward_sglang")
"""Rewards that a service of this name scores."""
WITHOUT = {
    "recon": "it compares with a picture that a prompt alone does not have",
    "gen_eval": "it needs more than a prompt, which the trainer does not hand on either: its scores were 0",
    "editreward": "it compares with a picture that a prompt alone does not have",
    "sim_direction": "it compares with a picture that a prompt alone does not have",
    "format": "it reads a text that this model does not write",
    "jpeg_compressibility": "lit_rl.rewards.jpeg has it under another scale",
    "jpeg_incompressibility": "lit_rl.rewards.jpeg has it under another scale",
}
"""Rewards that cannot be had under their names, and why."""
Entry = Mapping[str, object]


def migrate_yaml(file: Path) -> Migrated:
    """Read a YAML of training data, which names rewards, or of evaluation data. Raises ConfigError that names file and entry."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: this is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping) or "datasets" not in found:
        raise ConfigError(f"{file}: Missing 'datasets' key: DeepGen-RL's data files list their sources there")
    entries = found["datasets"]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{file}: 'datasets' must be a list of mappings with name and path")
    if odd := [str(key) for key in found if key not in ("datasets", "sampling_mode")]:
        raise unknown("key", odd[0], ("datasets", "sampling_mode"), place=str(file))
    if found.get("sampling_mode", MODES[0]) not in MODES:
        raise ConfigError(f"{file}: Invalid sampling_mode {found['sampling_mode']!r}. Must be one of: {', '.join(MODES)}")
    trains = "sampling_mode" in found or any({"rewards", "sample_weight"} & entry.keys() for entry in entries)
    return _training(file, entries) if trains else _evaluation(file, entries)


def _training(file: Path, entries: Sequence[Entry]) -> Migrated:
    check_entries(file, entries, TRAINING, PROMPTS)
    names: dict[str, None] = {}
    for entry in entries:
        place = f"{file}, dataset {entry.get('name')!r}"
        weight = entry.get("sample_weight", 1.0)
        if not isinstance(weight, int | float) or weight <= 0:
            raise ConfigError(f"{place}: sample_weight must be positive, got {weight}")
        names |= dict.fromkeys(_rewards(entry.get("rewards", []), place))
    made = Migrated(bases=list(CONFIGS))
    made.settings["data"] = {"class_path": "datamodules.prompt_sets.PromptSets", "init_args": {"train": str(file)}}
    rewards = {name: REWARDS.get(name, _served(name)) for name in sorted(names)}
    scoring = {"class_path": "callbacks.reward_scoring.RewardScoring", "init_args": {"rewards": rewards}}
    others = [{"class_path": EVALUATION_SETS}, {"class_path": "callbacks.export.Export", "init_args": {"every_n_epochs": 50}}]
    made.settings["trainer.callbacks"] = [scoring, *others]
    made.notes.append("The YAML stays as it is: it says which rewards count for which prompts, and with which weights.")
    return made


def _served(name: str) -> dict[str, object]:
    return {"class_path": "lit_rl.rewards.services.ServiceReward", "init_args": {"service": name}}


def _rewards(given: object, place: str) -> list[str]:
    """Names of the rewards of an entry. Raises ConfigError for those that nobody has, or that cannot be had here."""
    names = [str(name) for part in given if isinstance(part, Mapping) for name in part] if isinstance(given, list) else []
    for name in names:
        if name in WITHOUT:
            raise ConfigError(f"{place}: the reward {name} cannot be had here: {WITHOUT[name]}")
        if name not in REWARDS and name not in SERVED:
            raise unknown("reward", name, (*REWARDS, *SERVED, *WITHOUT), place=place)
    return names


def _evaluation(file: Path, entries: Sequence[Entry]) -> Migrated:
    check_entries(file, entries, EVALUATION, ROWS)
    made = Migrated(bases=list(CONFIGS))
    made.notes.append(f"The YAML stays as it is, and {EVALUATION_SETS} of the run reads it: export EVAL_DATASET_CONFIG={file}")
    return made


def check_entries(file: Path, entries: Sequence[Entry], known: Sequence[str], endings: Sequence[str]) -> None:
    """Raise ConfigError for an entry with other keys, without name or path, or whose file is missing or of another kind."""
    for i, entry in enumerate(entries):
        if "name" not in entry and known is EVALUATION:
            raise ConfigError(f"{file}: Dataset entry {i} missing required 'name' field")
        place = f"{file}, dataset {str(entry.get('name', i))!r}"
        if odd := [str(key) for key in entry if key not in known]:
            raise unknown("key", odd[0], known, place=place)
        if not isinstance(entry.get("path"), str):
            raise ConfigError(f"{place}: missing required 'path' field")
        path = file.parent / Path(str(entry["path"])).expanduser()
        if not path.is_file():
            raise ConfigError(f"{place}: file {entry['path']} not found (looked for {path})")
        if path.suffix not in endings:
            raise ConfigError(f"{place}: {entry['path']}: Unsupported file format. Use {', '.join(endings)}")


def migrate_python(file: Path) -> Migrated:
    """Read an SFT-aux configuration. Raises ConfigError that names file and line."""
    lists, resize = python_sources(file)
    data = {"class_path": "datamodules.picture_sources.PictureSources", "init_args": {"sources": lists, "resize": resize}}
    made = Migrated(bases=list(CONFIGS), settings={"model.init_args.supervised.data": data})
    made.notes.append("SFTAUX_DATASET_CONFIG in the environment may name the Python file as it is, too.")
    return made
