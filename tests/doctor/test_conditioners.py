"""Memory of DeepGen: sizes without weights are those with them, and reading prompts takes what it really takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepgen import build, deepgen_policy
from safetensors.torch import save_file
from test_memory import allocated, unread

from lit_rl.checkpoints.deepgen import read_deepgen
from lit_rl.doctor import phases
from lit_rl.doctor.conditioners import answering, hand_out_states, reading
from lit_rl.doctor.ledger import imagined
from lit_rl.doctor.memory import estimate
from lit_rl.doctor.placement import Placement
from lit_rl.doctor.shallow import extrapolated
from lit_rl.errors import ConfigError
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.policies.deepgen import DeepGenPolicy

TRAINED: list[dict[str, Any]] = [
    {"keep_reference": True},
    {"lora": {"rank": 2, "alpha": 2.0}, "dtype": "bfloat16"},
    {"train": ["transformer", "bridge"]},
    {"train": ["bridge", "adapter"], "keep_reference": True},
]
LONGEST = 96


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"language_hidden": 64, "connector_hidden": 64, "connector_layers": 3, "layers": 3}
    return build(tmp_path_factory.mktemp("deepgen"), **sizes)


def made(mini: Path, **options: Any) -> FlowGRPO:
    policy = deepgen_policy(mini, **{"max_sequence_length": LONGEST, **options})
    return FlowGRPO(policy, prompts_per_iteration=2, group_size=2)


@pytest.mark.parametrize("options", TRAINED, ids=["whole", "lora", "bridge", "adapter"])
def test_policies_without_weights_have_the_parameters_of_read_ones(mini: Path, options: dict[str, Any]) -> None:
    def told(policy: DeepGenPolicy) -> list[tuple[str, torch.Size, torch.dtype, bool]]:
        both = [*policy.named_parameters(), *policy._pipe.conditioner.named_parameters()]
        return [(name, p.shape, p.dtype, p.requires_grad) for name, p in both]

    real, method = deepgen_policy(mini, **options), made(mini, **options)
    real.load()
    assert told(unread(method).policy) == told(real)
    assert all(p.is_meta for p in method.policy.parameters())


@pytest.mark.parametrize("options", TRAINED[2:], ids=["bridge", "adapter"])
def test_a_training_step_that_reads_its_prompts_takes_what_is_told(mini: Path, options: dict[str, Any]) -> None:
    """Within 15 %, from two of seven layers of the language model."""
    real, method = made(mini, **options).policy, made(mini, **options)
    real.load()
    prompts = ["a" * (LONGEST - 38), "a" * (LONGEST - 39)]
    assert [len(real.tokens(prompt)) for prompt in prompts] == [LONGEST, LONGEST - 1], "the frame is 38 tokens"
    x, t = torch.zeros(4, *real.latent_shape()), torch.ones(4)
    phases.freed(dict.fromkeys(real.networks(), ()))

    def step() -> None:
        cond = real.encode(prompts)
        (real.velocity(x, t, {name: rows[[0, 1, 0, 1]] for name, rows in cond.items()}) ** 2).sum().backward()

    measured, policy = allocated(step), unread(method).policy
    blocks = {network: policy.blocks(network) for network in policy.networks()}
    with imagined(gpu=False):
        phases.prepared(blocks, Placement(gpu=False))
        hand_out_states(policy.conditioner)
        (told,) = extrapolated(answering(blocks), lambda: [phases._trained_pairs(method, policy, 4, None, prompts=2)])
    assert told == pytest.approx(measured, rel=0.15)


def test_reading_a_prompt_takes_what_is_told(mini: Path) -> None:
    real, method = made(mini).policy, made(mini)
    real.load()
    measured = allocated(lambda: real.frozen.encode(["a" * LONGEST], real.encode_one, device=torch.device("cpu")))
    assert reading(unread(method).policy, 1, gpu=False, lower=None) == pytest.approx(measured, rel=0.15)


def test_parts_are_counted_once_and_where_they_are(mini: Path) -> None:
    """A frozen conditioner is on the GPU while it reads; a trained one is a network among the others, each under the strategy."""
    frozen, trained = (
        estimate(made(mini, **options), Placement(processes=2, kind="fsdp"), data=None) for options in (TRAINED[0], TRAINED[2])
    )
    size = sum(p.nbytes for p in real_conditioner(mini).parameters())
    by_phase = {line.what: (line.phase, line.bytes) for line in frozen.lines}
    assert by_phase["text and style encoders"] == ("encoding", size)
    found = {line.what: line.bytes for line in trained.lines}
    assert found["weights of the conditioner, trained"] + found["weights of the conditioner, frozen"] == size / 2
    assert found["text and style encoders"] == 0


def real_conditioner(mini: Path) -> torch.nn.Module:
    policy = deepgen_policy(mini)
    policy.load()
    return policy._pipe.conditioner


def test_of_a_checkpoint_shapes_alone_are_read(mini: Path, tmp_path: Path) -> None:
    """The shapes of a file, of shards and of DeepSpeed's folder, in which the first process's file names them."""
    whole = read_deepgen(mini / "checkpoint.pth")
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    (folder := tmp_path / "deepspeed").mkdir()
    (folder / "latest").write_text("step")
    (folder / "step").mkdir()
    torch.save({"param_shapes": [{name: x.shape for name, x in whole.items()}]}, folder / "step/mp_rank_00_model_states.pt")
    for place in (mini / "checkpoint.pth", tmp_path / "model.safetensors", tmp_path, folder):
        found = read_deepgen(place, sizes=True)
        assert all(tensor.is_meta for tensor in found.values())
        assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in whole.items()}
    (tmp_path / "cut.pth").write_bytes((mini / "checkpoint.pth").read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"checkpoint: .*cut\.pth cannot be read, it is damaged"):
        read_deepgen(tmp_path / "cut.pth", sizes=True)
