"""Estimates of memory beside what a CPU really allocates, and beside sums by hand."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from any_lm import save_lm
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from toy_text import policy

from lit_rl.doctor import phases
from lit_rl.doctor.ledger import Ledger, imagine, imagined, mixed
from lit_rl.doctor.memory import Estimate, estimate, fits, lengths
from lit_rl.doctor.phases import Lengths
from lit_rl.doctor.placement import GIB, Line, Placement
from lit_rl.doctor.shallow import extrapolated, shallow
from lit_rl.losses.token_logprobs import CHUNK_ELEMENTS
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.methods.grpo import GRPO
from lit_rl.miniatures.images import build_flux, build_sd3
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.flux import FluxPolicy
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.policies.unread import without_weights
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.rollouts.native import NativeEngine

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000}
LENGTHS = Lengths(prompt=40, row=128, trained=80)
ROWS = 6
OFFLOADS = frozenset({"optimizer", "parameters"})


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had given out at once during `work`, beyond those from before it.

    No cycle of Python objects is collected meanwhile: tensors that an earlier test left in one would be counted as freed by `work`.
    """
    gc.collect()
    gc.disable()
    try:
        return _most(work)
    finally:
        gc.enable()


def _most(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("lm") / "qwen", "Qwen2", **SIZES, max_position_embeddings=256)


def grpo(folder: Path, **options: Any) -> GRPO:
    answers = Answers(sampling=Sampling(max_new_tokens=LENGTHS.row - LENGTHS.prompt), chunk=16)
    return GRPO(policy(folder, **options), prompts_per_iteration=3, group_size=2, answers=answers)


def unread(method: Any) -> Any:
    with torch.device("meta"), without_weights():
        method.policy.load()
    return method


def real_step(method: GRPO, autocast: torch.dtype | None) -> Callable[[], None]:
    """The micro-batch that `phases._trained_tokens` imagines."""
    policy = method.policy
    phases.freed({network: () for network in policy.networks()})
    tokens, lengths = torch.ones(ROWS, LENGTHS.row, dtype=torch.long), torch.full((ROWS,), LENGTHS.row)
    mask = torch.zeros(ROWS, LENGTHS.row - 1, dtype=torch.bool)
    mask[:, -LENGTHS.trained :] = True

    def step() -> None:
        with mixed(autocast):
            new = policy.logprobs(tokens, lengths, mask)[0].sum()
        new.backward()

    return step


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=8)])
def test_activations_are_those_of_a_real_step(
    lm: Path, checkpointing: bool, autocast: torch.dtype | None, lora: LoraSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 15 %, from three layers of four or more; logits in several chunks."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 100 * SIZES["vocab_size"])
    options = {"gradient_checkpointing": checkpointing, "lora": lora}
    real = grpo(lm, **options)
    real.policy.load()
    measured = allocated(real_step(real, autocast))
    method = unread(grpo(lm, **options))
    blocks = {method.policy.network: method.policy.blocks(method.policy.network)}
    with imagined(gpu=False):
        phases.prepared(blocks, Placement(gpu=False))
        (told,) = extrapolated(blocks, lambda: [phases._trained_tokens(method, None, ROWS, LENGTHS, autocast)])
        whole = phases._trained_tokens(method, None, ROWS, LENGTHS, autocast)
    assert told == pytest.approx(measured, rel=0.15)
    assert told == pytest.approx(whole, rel=0.02)


FLOW: Mapping[str, tuple[Callable[..., Path], type[DiffusersFlowPolicy], dict[str, Any]]] = {
    "sd3": (build_sd3, SD3Policy, {"layers": 4, "guidance_scale": 4.5}),
    "flux": (build_flux, FluxPolicy, {"layers": 3, "single_layers": 4}),
}


@pytest.mark.parametrize("family", FLOW)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_decoding_of_pictures_are_those_of_real_ones(family: str, checkpointing: bool, tmp_path: Path) -> None:
    build, kind, sizes = FLOW[family]
    guidance = {"guidance_scale": sizes["guidance_scale"]} if "guidance_scale" in sizes else {}
    layers = {name: value for name, value in sizes.items() if name != "guidance_scale"}
    build(tmp_path, height=64, width=64, hidden=128, heads=4, vae="conv", image_channels=3, **layers)

    def made() -> DiffusersFlowPolicy:
        return kind(
            str(tmp_path),
            resolution=64,
            max_sequence_length=16,
            lora=LoraSettings(rank=4),
            gradient_checkpointing=checkpointing,
            **guidance,
        )

    def cond(policy: DiffusersFlowPolicy) -> dict[str, Tensor]:
        return phases._conditions(policy, 3)

    real = made()
    real.load()
    told_cond, real_cond = cond(real), real.encode(["a", "b", "c"])
    assert {name: value.shape for name, value in told_cond.items()} == {name: value.shape for name, value in real_cond.items()}
    phases.freed({real.network: ()})
    x, t = torch.zeros(3, *real.latent_shape()), torch.ones(3)
    training = allocated(lambda: (real.velocity(x, t, cond(real)) ** 2).sum().backward())
    decoding = allocated(lambda: real.decode(x))

    method = unread(FlowGRPO(made(), prompts_per_iteration=1, group_size=2))
    network, policy = method.policy.network, method.policy
    blocks = {network: policy.blocks(network)}
    with imagined(gpu=False):
        phases.prepared(blocks, Placement(gpu=False))
        (told,) = extrapolated(blocks, lambda: [phases._trained_pairs(method, policy, 3, None, prompts=1)])
        imagine([policy._pipe.vae])
        decoded = phases._decoded(policy, 3)
    assert told == pytest.approx(training, rel=0.15)
    assert decoded == pytest.approx(decoding, rel=0.15)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_weights_gradients_and_moments_are_exact(lm: Path, optimizer: type[torch.optim.Optimizer], lora: LoraSettings | None) -> None:
    settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}

    def made() -> GRPO:
        return GRPO(
            policy(lm, lora=lora, keep_reference=True, dtype="bfloat16"), prompts_per_iteration=3, group_size=2,
            optimizer=lambda parameters: optimizer(parameters, lr=1e-3, **settings),  # type: ignore[call-arg]
        )  # fmt: skip

    real = made()
    real.policy.load()
    real_step(real, None)()
    real_optimizer = real.configured_optimizer()
    for _, parameter in real.policy.trainable():
        parameter.grad = torch.zeros_like(parameter)
    real_optimizer.step()
    weights = sum(p.nbytes for p in real.policy.parameters())
    gradients = sum(p.grad.nbytes for p in real.policy.parameters() if p.grad is not None)
    moments = sum(x.nbytes for state in real_optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.ndim)
    found = {line.what: line.bytes for line in estimate(made(), Placement(gpu=False), data=None).lines if line.phase in ("", "training")}
    assert sum(size for what, size in found.items() if what.startswith("weights")) == weights
    assert (found["gradients"], found[f"moments of {optimizer.__name__}"]) == (gradients, moments)


def test_graphs_of_decoding_keep_their_logits(lm: Path) -> None:
    """128 tokens are one graph, 600 are three: each has its own Float32 logits, and they share the rest."""

    def told(answer: int, *, graphs: bool) -> float:
        engine = NativeEngine(batch=8, cuda_graphs=graphs)
        answers = Answers(engine=engine, sampling=Sampling(max_new_tokens=answer), chunk=16)
        method = GRPO(policy(lm), prompts_per_iteration=8, group_size=2, answers=answers)
        found = estimate(method, Placement(), data=Namespace(init_args=Namespace(max_prompt_length=40)))
        return sum(line.bytes for line in found.lines if "CUDA graphs" in line.what)

    logits = 8 * SIZES["vocab_size"] * 4
    short, long = told(88, graphs=True), told(560, graphs=True)
    assert told(88, graphs=False) == 0 and short > logits
    assert long - short == pytest.approx(2 * logits, rel=0.2)


class Layer(nn.Linear):
    pass


def placed(**options: Any) -> list[Line]:
    network, frozen = nn.Sequential(Layer(8, 8), Layer(8, 8)), nn.Linear(8, 2)
    frozen.requires_grad_(False)
    networks = {"policy": network, "reference": frozen}
    placement = Placement(**{"processes": 4} | options)
    lines = [*placement.of_weights(networks), *placement.of_gradients(list(networks.values()))]
    return [*lines, *placement.of_gathering({network: list(network), frozen: [frozen]})]


@pytest.mark.parametrize(
    ("options", "always", "update", "gathered"),
    [
        ({"kind": "one", "processes": 1}, 4 * 144 + 4 * 18, 4 * 144, None),
        ({"kind": "ddp"}, 4 * 144 + 4 * 18 + 4 * 144, 0, None),
        ({"kind": "ddp", "views": False}, 4 * 144 + 4 * 18 + 4 * 144, 4 * 144, None),
        ({"kind": "fsdp", "gather": torch.bfloat16}, 144 + 18, 144, 2 * 2 * 72),
        ({"kind": "zero", "stage": 1, "whole": torch.bfloat16}, 2 * 144 + 2 * 18 + 144 + 2 * 2 * 144, 2 * 144 + 144, None),
        ({"kind": "zero", "stage": 2, "whole": torch.bfloat16}, 2 * 144 + 2 * 18 + 144 + 2 * 2 * 144, 72 + 144, None),
        ({"kind": "zero", "stage": 3, "whole": torch.bfloat16}, 72 + 9 + 144 + 2 * 2 * 144, 72 + 144, 2 * 162),
        (
            {"kind": "zero", "stage": 3, "whole": torch.bfloat16, "offloads": frozenset({"optimizer", "parameters"})},
            2 * 2 * 144,
            0,
            2 * 162,
        ),
    ],
)
def test_shares_are_those_of_the_strategy(options: dict[str, Any], always: float, update: float, gathered: float | None) -> None:
    """144 trained numbers in two blocks of 72, and 18 frozen ones in bytes, of four processes."""
    lines = placed(**options)
    assert sum(line.bytes for line in lines if not line.phase) == always
    assert sum(line.bytes for line in lines if line.phase == "update") == update
    found = [line.bytes for line in lines if line.phase == "rollout"]
    assert found == ([] if gathered is None else [gathered])


def test_the_options_of_a_trainer_name_a_placement() -> None:
    from lit_rl.doctor.runs import parse

    root = Path(__file__).parents[2] / "configs"

    def of(*bases: str) -> Placement:
        files = [word for base in bases for word in ("--config", str(root / base))]
        return Placement.of(parse([*files, "--config", str(root / "sft/qwen25_7b_gsm8k.yaml")]).trainer, processes=4, gpu=True)

    low = torch.bfloat16
    assert of("base/ddp.yaml") == Placement(processes=4, kind="ddp", autocast=low, accumulate=4)
    assert of("base/fsdp.yaml") == Placement(processes=4, kind="fsdp", gather=low, autocast=low, accumulate=4)
    assert of("base/deepspeed_zero3_offload.yaml") == Placement(
        processes=4, kind="zero", stage=3, offloads=OFFLOADS, whole=low, accumulate=4
    )
    assert of("base/deepspeed_zero1.yaml").share("moments") == 0.25 and of("base/deepspeed_zero1.yaml").share("gradients") == 1


def test_a_ledger_counts_what_is_there_at_once() -> None:
    before = torch.zeros(100)
    with Ledger() as ledger:
        a = torch.zeros(1000)
        assert ledger.now == 4000
        view = a.view(10, 100)[:2]
        del a
        assert ledger.now == 4000, "the view holds it"
        before.add_(1)
        b = view + 1
        del view
    assert (ledger.now, ledger.peak, b.numel()) == (800, 4800, 200)


def test_shallow_networks_have_the_blocks_of_each_kind_and_get_the_others_back() -> None:
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)])})
    blocks = {network: list(network["blocks"])}  # type: ignore[call-overload]
    with shallow(blocks, None):
        assert [p.shape[0] for p in network.parameters() if p.ndim == 2] == [4, 2]
    assert list(network["blocks"]) == blocks[network]  # type: ignore[call-overload]
    assert extrapolated(blocks, lambda: [float(sum(p.numel() for p in network.parameters()))]) == [3 * 20 + 10]


def test_it_fits_or_the_knob_is_named() -> None:
    found = Estimate([Line("weights", 20 * GIB), Line("activations", 50 * GIB, "training"), Line("keys", 10 * GIB, "rollout")])
    assert (found.total, found.fullest) == (70 * GIB, "training") and "50.00 GiB  training  activations" in found.table()
    told = {card: next(fits(found, card, there=there)) for card, there in ((80.0, True), (71.0, True), (40.0, True), (24.0, False))}
    assert [finding.status for finding in told.values()] == ["ok", "warning", "problem", "warning"]
    assert "88%" in told[80.0].text and "train_micro_batch" in told[40.0].text


def test_the_longest_rows_follow_from_data_and_sampling(lm: Path) -> None:
    method = grpo(lm)
    answer = LENGTHS.row - LENGTHS.prompt
    assert lengths(method, Namespace(init_args=Namespace(max_prompt_length=40))) == Lengths(prompt=40, row=128, trained=answer)
    mixed = Namespace(init_args=Namespace(max_prompt_length=40, max_length=200))
    assert lengths(method, mixed) == Lengths(prompt=40, row=200, trained=199)
    assert phases.micro_batch_rows(method, Placement(processes=3), LENGTHS) == 2
    assert phases.micro_batch_rows(method, Placement(accumulate=4), LENGTHS) == 2


def test_a_config_is_all_that_is_read(lm: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(lm)
    config.save_pretrained(tmp_path / "config alone")
    found = unread(GRPO(CausalLM(str(tmp_path / "config alone")), prompts_per_iteration=1, group_size=2)).policy
    assert all(p.is_meta for p in found.parameters())
    assert json.loads((lm / "config.json").read_text())["vocab_size"] == found.network.lm.get_input_embeddings().weight.shape[0]
