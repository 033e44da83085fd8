from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import Tensor

from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.lora import LoraSettings, adapter_parameters, add_frozen_copy, disabled_adapters, using_adapter

MakePolicy = Callable[..., DiffusersFlowPolicy]
MakeInputs = Callable[[DiffusersFlowPolicy], SimpleNamespace]
families = pytest.mark.parametrize("name", ["sd3", "flux"])


def velocity(policy: DiffusersFlowPolicy, batch: SimpleNamespace) -> Tensor:
    with torch.no_grad():
        return policy.velocity(batch.x, batch.t, batch.cond)


def train_a_little(policy: DiffusersFlowPolicy, batch: SimpleNamespace) -> None:
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=1e-1)
    for _ in range(2):
        policy.velocity(batch.x, batch.t, batch.cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@families
def test_only_the_adapter_is_trained_and_starts_at_zero(name: str, make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    policy, plain = make_policy(name, lora=LoraSettings(rank=2)), make_policy(name)
    batch = make_inputs(policy)
    assert torch.equal(velocity(policy, batch), velocity(plain, batch))
    trained = {key.removeprefix("network.").replace(".default.", ".") for key, _ in policy.trainable()}
    assert trained == adapter_parameters(policy.network, "default").keys()
    assert {target for target in policy.lora_targets if any(f".{target}.lora_A" in key for key in trained)} == set(policy.lora_targets)


@families
def test_reference_is_the_base_bit_for_bit_and_touches_no_flag(name: str, make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    policy = make_policy(name, lora=LoraSettings(rank=2))
    batch = make_inputs(policy)
    initial, flags = velocity(policy, batch), [p.requires_grad for p in policy.parameters()]
    train_a_little(policy, batch)
    trained = velocity(policy, batch)
    assert not torch.equal(trained, initial)
    with policy.reference():
        assert torch.equal(velocity(policy, batch), initial)
        assert [p.requires_grad for p in policy.parameters()] == flags
        with policy.reference():
            pass
        assert torch.equal(velocity(policy, batch), initial)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(velocity(policy, batch), trained)
    assert [p.requires_grad for p in policy.parameters()] == flags


@families
def test_kept_reference_is_the_adapter_as_it_was(name: str, make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    policy = make_policy(name, lora=LoraSettings(rank=2), keep_reference=True)
    batch = make_inputs(policy)
    base = velocity(policy, batch)
    train_a_little(policy, batch)
    warm = velocity(policy, batch)
    with policy.reference():
        assert torch.equal(velocity(policy, batch), base)
    policy.refresh_reference()
    train_a_little(policy, batch)
    with policy.reference():
        assert torch.equal(velocity(policy, batch), warm)
    assert not torch.equal(velocity(policy, batch), warm)
    assert all(".default." in key for key, _ in policy.trainable())


def test_adapters_beside_each_other(make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    policy = make_policy("sd3", lora=LoraSettings(rank=2))
    batch = make_inputs(policy)
    train_a_little(policy, batch)
    trained, state = velocity(policy, batch), torch.get_rng_state()
    add_frozen_copy(policy.network, "old")
    assert torch.equal(torch.get_rng_state(), state)
    with using_adapter(policy.network, "old"):
        assert torch.equal(velocity(policy, batch), trained)
        with disabled_adapters(policy.network):
            base = velocity(policy, batch)
    train_a_little(policy, batch)
    with using_adapter(policy.network, "old"):
        assert torch.equal(velocity(policy, batch), trained)
    assert not torch.equal(velocity(policy, batch), trained) and not torch.equal(trained, base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("keep_reference", [False, True])
def test_adapter_is_float32_on_a_low_precision_base(
    dtype: str, keep_reference: bool, make_policy: MakePolicy, make_inputs: MakeInputs
) -> None:
    policy = make_policy("sd3", lora=LoraSettings(rank=2), dtype=dtype, keep_reference=keep_reference)
    kinds = {(p.dtype, ".lora_" in key) for key, p in policy.named_parameters()}
    assert kinds == {(torch.float32, True), (getattr(torch, dtype), False)}
    policy.velocity(**vars(make_inputs(policy))).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in policy.trainable())


def test_first_draw_depends_on_the_run_seed_alone(make_policy: MakePolicy) -> None:
    drawn = []
    for seed, waste in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(seed)
        torch.rand(waste)
        policy = make_policy("sd3", lora=LoraSettings(rank=2))
        drawn.append(torch.cat([p.flatten() for _, p in policy.trainable()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@families
def test_saved_adapter_is_read_by_stock_diffusers(
    name: str, make_policy: MakePolicy, make_inputs: MakeInputs, folders: dict[str, Path], tmp_path: Path
) -> None:
    """alpha / rank = 6: a loader that took alpha for the rank would be off by a factor of 6."""
    policy = make_policy(name, lora=LoraSettings(rank=2, alpha=12.0), keep_reference=True)
    batch = make_inputs(policy)
    averaged = {key: torch.randn(p.shape) * 0.1 for key, p in policy.trainable()}
    before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    policy.save(tmp_path, averaged)
    assert all(torch.equal(tensor, before[key]) for key, tensor in policy.state_dict().items())
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    pipe.load_lora_weights(str(tmp_path))
    plain = velocity(policy, batch)
    for key, p in policy.trainable():
        p.data = averaged[key]
    ours = velocity(policy, batch)
    policy.network = pipe.transformer
    assert (ours - plain).norm() / plain.norm() > 0.01
    torch.testing.assert_close(velocity(policy, batch), ours)


def test_training_goes_on_from_a_saved_adapter(make_policy: MakePolicy, make_inputs: MakeInputs, tmp_path: Path) -> None:
    settings = {"rank": 2, "alpha": 12.0}
    policy = make_policy("sd3", lora=LoraSettings(**settings))
    batch = make_inputs(policy)
    train_a_little(policy, batch)
    policy.save(tmp_path, dict(policy.trainable()))
    again = make_policy("sd3", lora=LoraSettings(**settings, initial=str(tmp_path)), keep_reference=True)
    assert torch.equal(velocity(again, batch), velocity(policy, batch))
    with again.reference():
        assert torch.equal(velocity(again, batch), velocity(policy, batch))
    for other in ({"rank": 3, "alpha": 12.0}, {"rank": 2, "alpha": 4.0}, settings | {"targets": ["attn.to_q"]}):
        with pytest.raises(ValueError, match=r"lora\.initial: .* of rank 2 and alpha 12"):
            make_policy("sd3", lora=LoraSettings(**other, initial=str(tmp_path)))


def test_a_target_that_names_nothing_is_refused(make_policy: MakePolicy) -> None:
    with pytest.raises(ValueError, match=r"no linear layer ends in attn\.nope; a block has attn\.add_k_proj, .*attn\.to_q"):
        make_policy("sd3", lora=LoraSettings(rank=2, targets=["attn.to_q", "attn.nope"]))


def test_saving_something_else_is_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy("sd3", lora=LoraSettings(rank=2))
    with pytest.raises(ValueError, match="save: the adapter has .* tensors, got 1, 0 of them its own"):
        policy.save(tmp_path, {"network.nope": torch.zeros(1)})
