import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.weights.adapters import adapter_parameters, add_frozen_copy, tuner_layers
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.policies.weights.reference import switched

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
    layers = tuner_layers(policy.network)
    assert torch.equal(torch.get_rng_state(), state)
    with switched(layers, "_active_adapter", ["old"]):
        assert torch.equal(velocity(policy, batch), trained)
        with policy.reference():
            base = velocity(policy, batch)
    train_a_little(policy, batch)
    with switched(layers, "_active_adapter", ["old"]):
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


def rewritten(kind: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The same matrices in files of other programs, or with another configuration."""
    if kind == "no metadata":
        return tensors, None
    if kind == "ranks by layer":
        cut = {k: (v[:1] if "lora_A" in k else v[:, :1]).clone() if "attn.to_q" in k else v for k, v in tensors.items()}
        return cut, None
    if kind == "kohya":
        found: dict[str, Tensor] = {}
        for i, (key, value) in enumerate(sorted(tensors.items())):
            name = "lora_transformer_" + key.removeprefix("transformer.").rsplit(".lora_", 1)[0].replace(".", "_")
            found[f"{name}.{'lora_down' if 'lora_A' in key else 'lora_up'}.weight"] = value
            found.setdefault(f"{name}.alpha", torch.tensor(1.0 + i % 3))
        return found, None
    changes: dict[str, Any] = (
        {"use_rslora": True} if kind == "root of the rank" else {"alpha_pattern": {"transformer_blocks.0.attn.to_q": 1}}
    )
    return tensors, metadata | {f"transformer.{key}": value for key, value in changes.items()}


KINDS = ["no metadata", "ranks by layer", "kohya", "root of the rank", "alpha by layer"]


@pytest.mark.parametrize(("name", "kind"), [*(("flux", kind) for kind in KINDS), *(("sd3", kind) for kind in KINDS if kind != "kohya")])
def test_an_initial_adapter_is_as_strong_as_in_stock_diffusers(
    name: str, kind: str, make_policy: MakePolicy, make_inputs: MakeInputs, folders: dict[str, Path], tmp_path: Path
) -> None:
    policy = make_policy(name, lora=LoraSettings(rank=2, alpha=12.0, targets=["attn.to_q", "attn.to_v"]))
    batch = make_inputs(policy)
    plain = velocity(policy, batch)
    policy.save(tmp_path, {key: torch.randn(p.shape) * 0.3 for key, p in policy.trainable()})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as stored:
        tensors, metadata = {k: stored.get_tensor(k) for k in stored.keys()}, json.loads(stored.metadata()["lora_adapter_metadata"])  # noqa: SIM118
    tensors, metadata = rewritten(kind, tensors, metadata)
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(metadata)} if metadata else {"format": "pt"})
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    pipe.load_lora_weights(str(tmp_path))
    policy.network = pipe.transformer
    stock = velocity(policy, batch)
    assert (stock - plain).norm() / plain.norm() > 0.01
    again = make_policy(name, lora=LoraSettings(initial=str(file)))
    assert torch.equal(velocity(again, batch), stock)
    with again.reference():
        assert torch.equal(velocity(again, batch), stock)
    assert {p.dtype for _, p in again.trainable()} == {torch.float32} and all(".lora_" in key for key, _ in again.trainable())
    again.save(tmp_path / "export", dict(again.trainable()))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    pipe.load_lora_weights(str(tmp_path / "export"))
    again.network = pipe.transformer
    torch.testing.assert_close(velocity(again, batch), stock)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(1)}, "more than low-rank matrices .*dora_scale"),
        (
            {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)},
            "more than low-rank .*text_encoder",
        ),
        (
            {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(3.0)},
            "not read by diffusers for this Stable",
        ),
        ({"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": torch.ones(2, 32)}, "blocks.9.attn.to_q.lora_A"),
    ],
)
def test_an_initial_file_that_holds_more_is_refused(
    extra: dict[str, Tensor], message: str, make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy("sd3", lora=LoraSettings(rank=2, targets=["attn.to_q"]))
    policy.save(tmp_path, dict(policy.trainable()))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as stored:
        tensors, metadata = {k: stored.get_tensor(k) for k in stored.keys()}, stored.metadata()  # noqa: SIM118
    save_file(tensors | extra, file, metadata=metadata)
    with pytest.raises(ConfigError, match=message):
        make_policy("sd3", lora=LoraSettings(initial=str(tmp_path)))


@pytest.mark.parametrize(("field", "value"), [("lora_alpha", "8"), ("lora_alpha", 0), ("rank_pattern", ["to_q"])])
def test_a_field_of_a_file_that_says_nothing_is_named(field: str, value: Any, make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy("sd3", lora=LoraSettings(rank=2, targets=["attn.to_q"]))
    policy.save(tmp_path, dict(policy.trainable()))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as stored:
        tensors, metadata = {k: stored.get_tensor(k) for k in stored.keys()}, json.loads(stored.metadata()["lora_adapter_metadata"])  # noqa: SIM118
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(metadata | {f"transformer.{field}": value})})
    with pytest.raises(ConfigError, match=rf"lora\.initial: {field} of '.*safetensors' is .*, expected"):
        make_policy("sd3", lora=LoraSettings(initial=str(tmp_path)))


def test_a_target_that_names_nothing_is_refused(make_policy: MakePolicy) -> None:
    with pytest.raises(ValueError, match=r"no linear layer ends in attn\.nope; a block has attn\.add_k_proj, .*attn\.to_q"):
        make_policy("sd3", lora=LoraSettings(rank=2, targets=["attn.to_q", "attn.nope"]))


def test_saving_something_else_is_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy("sd3", lora=LoraSettings(rank=2))
    with pytest.raises(ValueError, match="save: the adapter has .* tensors, got 1, 0 of them its own"):
        policy.save(tmp_path, {"network.nope": torch.zeros(1)})
