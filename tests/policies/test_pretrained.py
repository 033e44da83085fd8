"""A faulty model folder is reported in one sentence, before any weight is read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lit_rl.policies.flux import FluxPolicy
from lit_rl.policies.pretrained import check_pretrained, check_resolution, vae_factor
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.policies.weights.lora import LoraSettings


@pytest.mark.parametrize("name", ["./nothing", "~/nothing-there", "nothing", "/no/such/folder", "a/b/c", "here/nothing"])
def test_a_missing_folder_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match=f"^pretrained: no such folder '{name}'"):
        SD3Policy(name)


def test_owner_and_name_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_pretrained("stabilityai/stable-diffusion-3.5-medium", pipeline="StableDiffusion3Pipeline", policies={}) is None


def test_an_unreadable_hub_id_is_named_on_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="^pretrained: 'nobody/nothing' is neither a folder nor a hub repository"):
        SD3Policy("nobody/nothing").load()


def test_a_folder_of_something_else_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model_index.json there, found nothing"):
        SD3Policy(str(tmp_path))
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"no model_index.json there, found config\.json"):
        SD3Policy(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(
        ValueError, match="holds a FluxPipeline, not a StableDiffusion3Pipeline; lit_rl.policies.flux.FluxPolicy serves that"
    ):
        SD3Policy(str(tmp_path))


def test_resolution_must_divide_into_tokens(folders: dict[str, Path]) -> None:
    """The miniatures have 2 x 2 pixels per latent cell and 2 x 2 cells per token: multiples of 4."""
    with pytest.raises(ValueError, match="resolution: 16 x 30 .* multiples of 4 .*; 16 x 32 fits"):
        SD3Policy(str(folders["sd3"]), resolution=(16, 30))
    with pytest.raises(ValueError, match="multiples of 4"):
        FluxPolicy(str(folders["flux"]), resolution=18)
    assert check_resolution(16, cell=4) == (16, 16)
    with pytest.raises(ValueError, match="0 x 16"):
        check_resolution((0, 16), cell=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale: must not be negative"),
        ({"vae_slice": 0}, "vae_slice: must be at least 1"),
        ({"cache_prompts": -1}, "cache_prompts: must not be negative"),
        ({"max_sequence_length": 513}, r"max_sequence_length: must be in 0\.\.512"),
    ],
)
def test_numbers_out_of_range_are_named(settings: dict, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=message):
        SD3Policy(str(folders["sd3"]), resolution=16, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank: must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha: must be positive"),
        ({"dropout": 1.0}, r"lora.dropout: must be in \[0, 1\)"),
        ({"targets": []}, "lora.targets: the list is empty"),
        ({"initial": "no/such/lora"}, "lora.initial: no such folder"),
    ],
)
def test_lora_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_constructing_reads_no_weights_and_imports_no_model_library(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from lit_rl.policies.sd3 import SD3Policy; from lit_rl.policies.flux import FluxPolicy; "
        f"SD3Policy({str(folders['sd3'])!r}, resolution=16); FluxPolicy({str(folders['flux'])!r}, resolution=16); "
        "assert not {'diffusers', 'transformers', 'peft'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_policies_are_configured_from_a_mapping(folders: dict[str, Path]) -> None:
    from jsonargparse import ArgumentParser

    from lit_rl.policies.base import FlowPolicy

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FlowPolicy, "policy")
    init = {"pretrained": str(folders["flux"]), "resolution": [16, 24], "lora": {"rank": 4, "targets": ["attn.to_q"]}, "dtype": "bfloat16"}
    policy = parser.instantiate(
        parser.parse_object({"policy": {"class_path": "lit_rl.policies.flux.FluxPolicy", "init_args": init}})
    ).policy
    assert isinstance(policy, FluxPolicy)
    assert (policy.resolution, policy.guidance_scale, policy.lora.rank, policy.lora.alpha) == ((16, 24), 3.5, 4, 64.0)


@pytest.mark.parametrize("levels", [4, "128", None])
def test_levels_of_the_vae_are_a_list(levels: object) -> None:
    with pytest.raises(ValueError, match="^pretrained: block_out_channels=.* of the VAE's config.json must be a list, one entry for each"):
        vae_factor({"block_out_channels": levels})
    assert vae_factor({"block_out_channels": [64, 128, 256, 256]}) == 8
