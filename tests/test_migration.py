"""Every option of the earlier trainer has its row in docs/migration.md, and everything that the page sends people to exists."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from datamodules.inpainting import Inpainting
from lit_rl.command_line.usual import RunFolder, UsualCallbacks
from lit_rl.credit.advantage import Advantage
from lit_rl.doctor.__main__ import parser as doctor_parser
from lit_rl.losses.flow import FlowKL
from lit_rl.losses.point_surrogates import NFT
from lit_rl.losses.step_surrogates import Clip
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.modules.supervised import Supervised
from lit_rl.policies.flux_fill import FluxFillPolicy
from lit_rl.policies.style import StyleSettings
from lit_rl.rewards import launch, server
from lit_rl.samplers.points import Points

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/migration.md").read_text()
PAGES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("migration", "migration_llm")}
OLD = """
    --model_type --pretrained_model_name_or_path --siglip_path --output_dir --revision --variant --cache_dir --train_data_json
    --max_train_samples --dataset_name --dataset_config_name --image_column --caption_column --seed --resolution --train_batch_size
    --num_train_epochs --max_train_steps --checkpointing_steps --gradient_accumulation_steps --learning_rate --lr_scheduler
    --lr_warmup_steps --max_grad_norm --mixed_precision --dataloader_num_workers --max_sequence_length --weighting_scheme --use_rl
    --rl_method --rl_warmup_steps --rl_num_images_per_prompt --rl_num_batches_per_epoch --rl_num_inference_steps --rl_guidance_scale
    --rl_timestep_fraction --rl_num_inner_epochs --rl_adv_clip_max --rl_per_prompt_stat_tracking --rl_grpo_clip_range --rl_kl_beta
    --nft_beta --nft_adv_mode --nft_decay_type --use_ema --ema_decay --ema_update_interval --ocr_weight --vlm_weight
    --reward_server_url --vlm_model_path --no_rl_reward_model --gradient_checkpointing --offload_text_encoder_two --use_8bit_adam
    --enable_memory_profiler --report_to --logging_dir --initial_ip_adapter_path --rl_reward_image_from
"""
ROOMS: dict[str, list[type]] = {
    "model.init_args.policy.init_args.style": [StyleSettings],
    "model.init_args.policy.init_args": [FluxFillPolicy],
    "model.init_args.optimizer.init_args": [torch.optim.AdamW],
    "model.init_args.advantage": [Advantage],
    "model.init_args.supervised": [Supervised],
    "model.init_args.kl": [FlowKL],
    "model.init_args.surrogate.init_args": [Clip, NFT],
    "model.init_args.points": [Points],
    "model.init_args": [FlowGRPO, DiffusionNFT],
    "data.init_args": [Inpainting],
    "run.callbacks": [UsualCallbacks],
    "run": [RunFolder],
    "trainer": [L.Trainer],
}
ONE_METHOD = {"nft": DiffusionNFT, "grpo": FlowGRPO}
"""Options with this in their name are of one method."""


def parameters(cls: type) -> set[str]:
    return {p for c in inspect.getmro(cls) if "__init__" in vars(c) for p in inspect.signature(c.__init__).parameters}


def rows() -> list[tuple[list[str], list[str]]]:
    """Old options and keys of each row of the first table."""
    table = TEXT.split("## Commands")[0]
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| `--")]
    return [(list(dict.fromkeys(re.findall(r"`(--\w+)", row[1]))), re.findall(r"`([\w.]+)`", row[2])) for row in cells]


KEYS = [(key, option) for options, keys in rows() for key in keys for option in options]


@pytest.mark.parametrize(("key", "option"), KEYS, ids=[f"{option}->{key}" for key, option in KEYS])
def test_key_exists(key: str, option: str) -> None:
    """In each class that the option is for."""
    if key in ("seed_everything", "model.class_path"):
        return
    room = next(room for room in ROOMS if key.startswith(room + "."))
    methods = [cls for name, cls in ONE_METHOD.items() if name in option and room == "model.init_args"]
    if (name := key.removeprefix(room + ".").partition(".")[0]) in ("timestep_fraction", "low", "high"):  # Flow-GRPO's
        methods = ROOMS[room][:1]
    if name in ("points", "beta", "mode"):  # DiffusionNFT's
        methods = ROOMS[room][-1:]
    for cls in methods or ROOMS[room]:
        assert name in parameters(cls)


def test_every_old_option_has_one_row() -> None:
    assert sorted(option for options, _ in rows() for option in options) == sorted(OLD.split())


def test_rows_without_a_key_say_why() -> None:
    for line in TEXT.split("## Commands")[0].splitlines():
        if line.startswith("| `--") and not re.search(r"`[\w.]+`", line.split("|")[2]):
            assert len(line.split("|")[3].strip()) > 10, line


# ------------------------------------------------------------------ classes, modules, files and options in the whole page
CALLS = [call for page in PAGES.values() for call in re.findall(r"`([\w.]+\.[A-Z]\w+)\(([^`]*)\)`", page)]


@pytest.mark.parametrize(("path", "arguments"), CALLS, ids=[path.rpartition(".")[2] for path, _ in CALLS])
def test_class_takes_the_arguments(path: str, arguments: str) -> None:
    """`a.b.Class(name: value, name)`."""
    module, _, name = path.rpartition(".")
    given: dict[str, Any] = yaml.safe_load("{" + arguments + "}")
    assert given.keys() <= parameters(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_classes_modules_and_configs_exist(page: str) -> None:
    for path in re.findall(r"`((?:lit_rl|callbacks|datamodules)(?:\.\w+)+)", page):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name) if name[0].isupper() else importlib.import_module(path)
    for path in [*re.findall(r"configs/[\w/]+\.yaml", page), *(f"docs/{link}" for link in re.findall(r"\]\(([\w.]+)\)", page))]:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", ["launch", "doctor"])
def test_options_of_our_commands_exist(name: str) -> None:
    found = re.findall(rf"`python -m lit_rl(?:\.rewards)?\.{name} ([^`]*)`", TEXT)
    assert found
    for line in found:
        own, _, rest = line.partition(" -- ")
        args, unknown = {"launch": launch.parser, "doctor": doctor_parser}[name]().parse_known_args(shlex.split(own))
        assert not unknown and args
        assert not server.parser().parse_known_args(shlex.split(rest))[1]


def test_long_options_of_the_examples_are_keys() -> None:
    """`--model.init_args.x` anywhere on the page is a key of both methods."""
    for key in set(re.findall(r"--((?:model|data|trainer)\.[\w.]+)", TEXT)) - {"model.help"}:
        room = next(room for room in ROOMS if key.startswith(room + "."))
        assert all(key.removeprefix(room + ".") in parameters(cls) for cls in ROOMS[room]), key
