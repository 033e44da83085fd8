"""DeepGen-RL's options, scripts and data files: each has its place here, and what it cannot have is told in a sentence."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.deepgen_sources import python_sources
from lit_rl.command_line.options import constructor_options, options
from lit_rl.doctor.runs import parse
from lit_rl.errors import ConfigError
from lit_rl.migrate.__main__ import main
from lit_rl.migrate.deepgen import check_value, migrate, migrate_options
from lit_rl.migrate.deepgen_flags import FLAGS, NOTHING, OTHERS, REMOVED, accumulation

ROOT = Path(__file__).parents[2]
HERE = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests/golden")) / "deepgen"
GOLDEN: dict[str, Any] = json.loads((HERE / "cli.json").read_text())
PAGE = (ROOT / "docs/migration_deepgen.md").read_text()
ROWS = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `--")]
BASES = ["configs/base/deepspeed_zero2.yaml"]


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key of the runs in configs/deepgen."""
    found: set[str] = set()
    for name in ("flow_grpo", "diffusion_nft"):
        files = [*BASES, f"configs/deepgen/{name}.yaml"]
        found |= {option.path for option in options([word for file in files for word in ("--config", str(ROOT / file))])}
    return found | {option.path for option in constructor_options(ModelCheckpoint, "run.callbacks.newest")}


def is_key(key: str, keys: set[str]) -> bool:
    return key in keys or key in {"model.class_path", "run.callbacks.samples", "run.callbacks.samples.every_n_iterations"}


# ---------------------------------------------------------------------- options
@pytest.mark.golden
def test_every_option_of_the_authors_is_known_and_on_the_page() -> None:
    theirs = set(GOLDEN["defaults"])
    assert theirs == {*FLAGS, *NOTHING, *OTHERS, *REMOVED}
    assert sorted(name for row in ROWS for name in re.findall(r"`--(\w+)`", row[1])) == sorted(theirs)


def test_every_key_of_the_page_exists(keys: set[str]) -> None:
    for row in ROWS:
        named = [key for key in re.findall(r"`([a-z_]+(?:\.\w+)+|data)`", row[2]) if key != "data"]
        assert [key for key in named if not is_key(key, keys)] == [], row[1]
        assert named or len(row[3].strip()) > 10, row[1]


@pytest.mark.golden
def test_every_default_of_the_authors_becomes_keys_that_exist(keys: set[str]) -> None:
    """For the algorithms of two shapes; sizes of batches, the last flag and what has to be off included."""
    for algorithm in ("flowgrpo", "diffusionnft"):
        given = {n: str(v) for n, v in GOLDEN["defaults"].items() if v is not None and not isinstance(v, list)}
        made = migrate_options(given | {"atrain_algorithm": algorithm}, place="x.sh")
        assert [key for key in made.settings if not is_key(key, keys)] == []
        assert made.settings["model.init_args.prompts_per_iteration"] == 32
        assert made.settings["model.init_args.policy.init_args.guidance_scale"] == 1.0  # their 0: the prompt alone


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["grad_accum"], ids=lambda case: str(case["inputs"].values()))
def test_micro_batches_are_counted_as_the_authors_do(case: dict[str, Any]) -> None:
    given = case["inputs"]
    sizes = {"images": given["atrain_global_batch_size"], "micro": given["atrain_micro_batch_size"], "processes": given["world_size"]}
    if isinstance(case["outputs"], dict):
        with pytest.raises(ConfigError, match="is no multiple of"):
            accumulation(**sizes)
    else:
        assert accumulation(**sizes) == case["outputs"]


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["validation"], ids=lambda case: str(case["inputs"]))
def test_values_are_refused_as_the_authors_do(case: dict[str, Any]) -> None:
    ((name, value),) = case["inputs"].items()
    if case["outputs"] == "ok":
        check_value(name, str(value), place="x.sh")
        assert migrate_options({name: str(value)}, place="x.sh").settings
        return
    with pytest.raises(ConfigError, match=re.escape(f"x.sh: {case['outputs'].removeprefix('Error: ')}") + "$"):
        migrate_options({name: str(value)}, place="x.sh")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rolout_n": "4"}, "option --rolout_n is unknown; did you mean --rollout_n?"),
        ({"num_generations": "4"}, "--num_generations is refused by DeepGen-RL itself: set --rollout_n"),
        ({"lr_scheduler_type": "cosine"}, "it must be constant or constant_with_warmup; for another name a scheduler of torch"),
        ({"atrain_adv_type": "ppo"}, "--atrain_adv_type ppo: it must be one of gdpo, grpo, grpo_global_std, reinforcepp"),
        ({"atrain_global_batch_size": "128"}, "128 x --atrain_num_actor_update_steps 1 is not --rollout_global_batch_size 256: .* to 128"),
        ({"rollout_n": "7"}, "256 is no multiple of --rollout_n 7"),
        ({"learning_rate": "fast"}, "--learning_rate fast: it must be a number"),
        ({"max_steps": "2.5"}, "--max_steps 2.5: it must be a whole number"),
        ({"rollout_global_batch_size": "many"}, "--rollout_global_batch_size many: it must be a positive whole number"),
        ({"report_to": "mlflow"}, "it must be wandb, swanlab, tensorboard or none; mlflow"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_told(given: dict[str, str | None], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        migrate_options(given, place="x.sh")


SCRIPT = """
set -e
export CHECKPOINT="${CHECKPOINT:-/models/pre.pth}"
export WANDB_API_KEY=never-shown
export OCR_URL=http://reward:18082
export ATRAIN_ADV_CLIP_MAX=3
export ATRAIN_NFT_BETA=7
export ATRAIN_INCLUDE_LAST_DENOISE_STEP=1
OUTPUT_DIR="${OUTPUT_DIR:-outputs/$(date +%Y)}"
RUN=first  # a comment
# python -m deepgen_rl.grpo_deepgen --beta 7
torchrun --nproc_per_node=${NGPUS} \\
    -m deepgen_rl.grpo_deepgen \\
    --checkpoint "${CHECKPOINT}" --output_dir "${OUTPUT_DIR}" --run_name "${RUN}_run" \\
    --lr_scheduler_type constant_with_warmup --deepspeed scripts/deepspeed/zero3_offload.json \\
    --dataset_config data/train.yaml --prompts_file old.txt --atrain_adv_type grpo --sftaux_dataset_config "aux.py" \\
    --rollout_n 4 --beta=0 --atrain_sde_sampler flowgrpo_sde --image_height 768 --bf16 --report_to wandb,swanlab "$@" 2>&1 | tee train.log
echo done
"""


def test_a_script_becomes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Variables with defaults are filled in, nothing is executed, and the command that is printed parses."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CHECKPOINT", raising=False)
    (tmp_path / "train.sh").write_text(SCRIPT)
    main(["deepgen", str(tmp_path / "train.sh")])
    text = capsys.readouterr().out
    assert "--output_dir: its value is not in the script" in text
    (tmp_path / "run.yaml").write_text(text)
    command = next(line for line in text.splitlines() if "python cli.py fit" in line).split("fit ")[1]
    run = parse(command.replace("run.yaml", str(tmp_path / "run.yaml")).split())
    policy, model = run.model.init_args.policy.init_args, run.model.init_args
    assert (policy.checkpoint, policy.keep_reference, list(policy.resolution)) == ("/models/pre.pth", False, [768, 512])
    assert (model.group_size, model.prompts_per_iteration, model.kl.kind, model.sde.dynamics) == (
        4,
        64,
        "v_diffusion",
        "flow_sde",
    )
    assert (run.data.init_args.train, model.supervised.data.init_args.sources) == ("data/train.yaml", "aux.py")
    assert (model.advantage.kind, model.advantage.std, model.advantage.clip, model.last_step) == ("sum", "group", 3, True)
    assert "export those that you do not: CHECKPOINT=/models/pre.pth OCR_URL=http://reward:18082\n" in text and "never-shown" not in text
    assert run.trainer.strategy.init_args.offload_optimizer and run.run.name == "first_run"
    assert [logger.class_path for logger in run.trainer.logger] == ["callbacks.trackers.WandB", "callbacks.trackers.SwanLab"]


# ---------------------------------------------------------------------- data
def test_evaluation_data_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "bench.csv").write_text("index,prompt,sub_dims\n")
    (tmp_path / "eval.yaml").write_text("datasets: [{name: bench, path: bench.csv, cfg_scale: 4.0, scoring: unigenbench/en}]")
    text = migrate(tmp_path / "eval.yaml").yaml("eval.yaml")
    assert yaml.safe_load(text) == {} and f"export EVAL_DATASET_CONFIG={tmp_path}/eval.yaml" in text


def test_training_data_name_their_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a cat\n")
    rows = [{"name": "a", "path": "a.txt", "sample_weight": 3, "rewards": [{"ocr": 0.7}, {"unifiedreward_think": 0.3}]}]
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"datasets": rows}))
    (tmp_path / "run.yaml").write_text(text := migrate(tmp_path / "train.yaml").yaml("train.yaml"))
    run = yaml.safe_load(text)
    monkeypatch.chdir(ROOT)
    command = next(line for line in text.splitlines() if "python cli.py fit" in line).split("fit ")[1]
    assert parse(command.replace("run.yaml", str(tmp_path / "run.yaml")).split()).data.class_path == "datamodules.prompt_sets.PromptSets"
    assert run["data"]["init_args"] == {"train": str(tmp_path / "train.yaml")}
    rewards = run["trainer"]["callbacks"][0]["init_args"]["rewards"]
    assert rewards["ocr"]["init_args"] == {"service": "ocr"} and rewards["unifiedreward_think"]["class_path"].endswith("UnifiedRewardThink")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("datasets: [{name: x, path: a.txt, rewards: [{oct: 1}]}]", "dataset 'x': reward oct is unknown; did you mean ocr?"),
        ("datasets: [{name: x, path: a.txt, rewards: [{recon: 1}]}]", "the reward recon cannot be had here: it compares with a picture"),
        ("datasets: [{path: a.txt, rewards: [], sample_weights: 1}]", "key sample_weights is unknown; did you mean sample_weight?"),
        ("{sampling_mode: other, datasets: []}", "Invalid sampling_mode 'other'. Must be one of: sample_proportional, weight_only"),
        ("datasets: [{name: x, path: a.txt, sample_weight: 0}]", "sample_weight must be positive, got 0"),
        ("datasets: [{name: x, path: gone.txt, rewards: []}]", "file gone.txt not found"),
        ("datasets: [{name: x, path: run.yaml, rewards: []}]", "Unsupported file format. Use .txt, .jsonl, .parquet"),
        ("datasets: [{path: a.txt}]", "Dataset entry 0 missing required 'name' field"),
        ("other: 1", "Missing 'datasets' key"),
        ("datasets: 3", "'datasets' must be a list"),
        ("{", "this is not YAML"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_is_told(text: str, told: str, tmp_path: Path) -> None:
    """In the authors' words where they have any."""
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        migrate(tmp_path / "run.yaml")


# ---------------------------------------------------------------------- Python configurations
SFT = """import os
from mmengine.config import read_base
from somewhere import BLIP3oDataset, WeightedInfiniteSampler

with read_base():
    from .sizes import image_size

ROOT = os.environ.get('DATA_ROOT', '/data')
first = dict(type=BLIP3oDataset, image_size=image_size, data_path=f'{ROOT}/first.json', sample_weight=-1.0 + 4)
second = dict(type=BLIP3oDataset, data_path=os.path.join(ROOT, 'second.json'), image_folder=ROOT + '/raw')
train_dataloader = dict(batch_size=2, dataset=dict(type='ConcatDataset', datasets=[first] + [second]), sampler=dict(shuffle=True))
"""


def test_a_python_configuration_is_read_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/mine")
    (tmp_path / "sizes.py").write_text("image_size = 512\n")
    (tmp_path / "aux.py").write_text(SFT)
    first = {"path": "/mine/first.json", "weight": 3.0, "size": 512}
    expected = [first, {"path": "/mine/second.json", "folder": "/mine/raw"}]
    assert python_sources(tmp_path / "aux.py") == (expected, "area")
    data = yaml.safe_load(migrate(tmp_path / "aux.py").yaml("aux.py"))["model"]["init_args"]["supervised"]["data"]
    assert data["init_args"] == {"sources": expected, "resize": "area"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("x = open('executed', 'w')", r"aux.py:1: `open\('executed', 'w'\)` is more than an assignment"),
        ("for i in range(3): pass", "aux.py:1: `for i in range"),
        ("x = os.environ['NOWHERE_SET']", "NOWHERE_SET is not set in the environment"),
        ("x = [", "this is not Python"),
        ("x = 1", "there is no train_dataloader"),
        ("train_dataloader = dict(dataset=dict(data_pth='a'))", "key data_pth is unknown; did you mean data_path?"),
        ("with read_base():\n    from .gone import a", "there is no .*gone.py; copy it beside this file"),
    ],
)
def test_more_than_values_is_refused(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "aux.py").write_text(line)
    with pytest.raises(ConfigError, match=told):
        python_sources(tmp_path / "aux.py")


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["deepgen", str(tmp_path / "gone.yaml")])
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: no such file: {tmp_path}/gone.yaml\n"
