"""Merges of models and adapters: by hand, against PEFT's own, and as stock libraries read the result."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from lora_folders import logits, moved
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rl.checkpoints.tensors import Facts
from lit_rl.errors import ConfigError
from lit_rl.miniatures.images import build_sd3
from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.sd3 import SD3Policy
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.surgery.formulas import combined, linear, of_differences, slerp
from lit_rl.surgery.merging import merge
from lit_rl.surgery.writing import write_shards


def stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def changed(base: Path, folder: Path, seed: int) -> Path:
    """A model trained from `base`, so to speak."""
    lm = stock(base)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn(p.shape, generator=draws), alpha=0.05)
    lm.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_lm(tmp_path_factory.mktemp("lm") / "model", hidden=32)


# ---------------------------------------------------------------------- formulas
def test_formulas_by_hand() -> None:
    """Two differences of four numbers; with half of them kept, ties keeps 4 and -3, then 4 and 2, and elects plus, minus, and nothing."""
    start = torch.tensor([1.0, 1.0, 1.0, 1.0])
    a, b = start + torch.tensor([4.0, -3.0, 1.0, 0.5]), start + torch.tensor([2.0, 1.0, 4.0, 0.0])
    torch.testing.assert_close(linear([a, b], [3.0, 1.0]), start + torch.tensor([3.5, -2.0, 1.75, 0.375]))
    how: dict[str, Any] = {"density": 0.5, "seed": 0, "name": "w"}
    torch.testing.assert_close(
        of_differences("task_arithmetic", start, [a, b], [1.0, -0.5], **how), start + torch.tensor([3.0, -3.5, -1.0, 0.5])
    )
    # kept: (4, -3, 0, 0) and (2, 0, 4, 0); signs: +, -, +; weighted by 1 and 0.5, divided by how many agree: (4 + 1) / 2, -3, 2
    torch.testing.assert_close(of_differences("ties", start, [a, b], [1.0, 0.5], **how), start + torch.tensor([2.5, -3.0, 2.0, 0.0]))
    # at density 1 all is kept: signs +, -, +, +; (4 + 1) / 2, -3, (1 + 2) / 2, 0.5
    whole = of_differences("ties", start, [a, b], [1.0, 0.5], **how | {"density": 1.0})
    torch.testing.assert_close(whole, start + torch.tensor([2.5, -3.0, 1.5, 0.5]))


def test_slerp_by_hand() -> None:
    """A third of a right angle; the length stays that of both; directions that agree are averaged."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(slerp([a, b], [2.0, 1.0]), torch.tensor([[math.sqrt(3.0), 1.0]]))
    torch.testing.assert_close(slerp([a, 3 * a], [1.0, 1.0]), 2 * a)
    torch.testing.assert_close(slerp([a, 0 * a], [1.0, 1.0]), a / 2)


def test_draws_of_dare_are_a_function_of_seed_and_name() -> None:
    """What stays is scaled up, so the mean over many numbers is that of the differences; the global stream is left alone."""
    tasks = [torch.ones(20_000), 2 * torch.ones(20_000)]
    before = torch.get_rng_state()
    one, again, other, name = (
        combined("dare_linear", tasks, [1.0, 1.0], density=0.25, seed=seed, name=n) for seed, n in ((1, "w"), (1, "w"), (2, "w"), (1, "v"))
    )
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, name)
    assert set(one.unique().tolist()) == {0.0, 4.0, 8.0, 12.0} and abs(one.mean() - 3) < 0.2
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------- whole models
def test_models_are_averaged_and_read_by_transformers(base: Path, tmp_path: Path) -> None:
    inputs = [changed(base, tmp_path / name, seed) for seed, name in enumerate("ab")]
    told: list[tuple[int, int, str]] = []
    out = merge(inputs, tmp_path / "out", weights=[3.0, 1.0], progress=lambda *step: told.append(step))
    a, b, found = (stock(folder).state_dict() for folder in (*inputs, out))
    assert all(torch.allclose(found[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-6) for name in a) and len(found) == len(a)
    assert [step[0] for step in told] == [*range(1, told[0][1] + 1)] and {step[2] for step in told} >= {"lm_head.weight"}
    assert CausalLM(str(out)).encode("a1") == CausalLM(str(base)).encode("a1")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    half = merge([out], tmp_path / "half", dtype="bfloat16")  # one input is a change of form
    assert transformers.AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    assert torch.equal(stock(half).state_dict()["lm_head.weight"], found["lm_head.weight"].bfloat16().float())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_differences_from_a_base_are_those_of_peft(method: Any, base: Path, tmp_path: Path) -> None:
    """Over the shards of one input."""
    from peft.utils.merge_utils import task_arithmetic, ties

    inputs = [changed(base, tmp_path / name, seed) for seed, name in enumerate("ab")]
    stock(inputs[1]).save_pretrained(inputs[1], max_shard_size="40kB")
    (inputs[1] / "model.safetensors").unlink()
    assert len([*inputs[1].glob("*.safetensors")]) > 2
    out = merge(inputs, tmp_path / "out", method=method, weights=[0.6, 0.4], base=str(base), density=0.3)
    start, a, b, found = (stock(folder).state_dict() for folder in (base, *inputs, out))
    for name in start:
        tasks, weights = [a[name] - start[name], b[name] - start[name]], torch.tensor([0.6, 0.4])
        expected = task_arithmetic(tasks, weights) if method == "task_arithmetic" else ties(tasks, weights, 0.3)
        torch.testing.assert_close(found[name], start[name] + expected)


def test_pipelines_are_merged_in_their_transformer(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"height": 16, "width": 16, "hidden": 32, "heads": 2, "layers": 2, "text_hidden": 16, "t5_hidden": 32}
    a, b = (build_sd3(tmp_path / name, seed=seed, **sizes) for seed, name in enumerate("ab"))
    out = merge([a, b], tmp_path / "out")
    parts = [diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer").state_dict() for folder in (a, b, out)]
    assert all(torch.allclose(parts[2][name], (parts[0][name] + parts[1][name]) / 2, atol=1e-6) for name in parts[0])
    how: dict[str, Any] = {"resolution": 16, "max_sequence_length": 8}
    first, whole = SD3Policy(str(a), **how), SD3Policy(str(out), **how)
    first.load(), whole.load()
    assert all(torch.equal(one, two) for one, two in zip(first.encode(["a"]).values(), whole.encode(["a"]).values()))  # a's text encoders


def test_only_the_tensors_of_one_name_are_in_memory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When tensors of a name are read, no earlier name's are left."""
    from lit_rl.checkpoints import tensors

    alive: list[tuple[str, Any]] = []

    def number(self: Any, name: str) -> Tensor:
        found: Tensor = self.read(name)
        assert not [other for other, tensor in alive if other != name and tensor() is not None], name
        alive.append((name, weakref.ref(found)))
        return found

    monkeypatch.setattr(tensors.Tensors, "number", number)
    inputs = [changed(base, tmp_path / name, seed) for seed, name in enumerate("ab")]
    merge(inputs, tmp_path / "out", method="ties", base=str(base))
    assert len(alive) == 3 * len(load_file(base / "model.safetensors"))


def test_files_are_cut_as_asked(tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(10, generator=torch.Generator().manual_seed(i)) for i in range(5)} | {"half": torch.ones(3).bfloat16()}
    facts = {name: Facts(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    write_shards(tmp_path, "model", facts, lambda name: state[name], shard=90)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] and index["metadata"] == {"total_size": 206}
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


# ---------------------------------------------------------------------- adapters
def peft_merged(base: Path, adapters: list[Path], weights: list[float], **how: Any) -> Tensor:
    model = peft.PeftModel.from_pretrained(stock(base), adapters[0], adapter_name="a0")
    for i, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    model.add_weighted_adapter([f"a{i}" for i in range(len(adapters))], weights, "merged", **how)
    model.set_adapter("merged")
    return logits(model)


def test_adapters_are_merged_as_peft_does(base: Path, tmp_path: Path) -> None:
    """Exact sums, with ranks that differ, and ties of the factors; PEFT reads the result. Added to the base it is the same model."""
    settings = [LoraSettings(rank=2, alpha=6.0), LoraSettings(rank=2, alpha=1.0), LoraSettings(rank=3, alpha=6.0)]
    adapters = [moved(CausalLM(str(base), lora=lora), tmp_path / f"a{i}", i) for i, lora in enumerate(settings)]
    out = merge(adapters, tmp_path / "sum", method="task_arithmetic", weights=[0.5, 0.7, -0.2])
    expected = peft_merged(base, adapters, [0.5, 0.7, -0.2], combination_type="cat")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(stock(base), out)), expected, rtol=1e-4, atol=1e-4)
    assert (out / "generation_config.json").is_file()
    whole = merge(adapters, tmp_path / "whole", method="lora", weights=[0.5, 0.7, -0.2])  # of the base that they name
    torch.testing.assert_close(logits(stock(whole)), expected, rtol=1e-4, atol=1e-4)
    tied = merge(adapters[:2], tmp_path / "ties", method="ties", weights=[0.5, -0.7], density=0.6)
    expected = peft_merged(base, adapters[:2], [0.5, -0.7], combination_type="ties", density=0.6)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(stock(base), tied)), expected, rtol=1e-4, atol=1e-4)
    second = CausalLM(str(out), lora=LoraSettings())  # and can be trained on
    second.load()


def test_adapters_of_pipelines(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"height": 16, "width": 16, "hidden": 32, "heads": 2, "layers": 2, "text_hidden": 16, "t5_hidden": 32}
    model = build_sd3(tmp_path / "model", **sizes)
    how: dict[str, Any] = {"resolution": 16, "max_sequence_length": 8}
    adapters = [
        moved(SD3Policy(str(model), lora=LoraSettings(rank=2, alpha=alpha), **how), tmp_path / name, seed)
        for seed, (name, alpha) in enumerate({"a": 6.0, "b": 1.0}.items())
    ]
    out = merge(adapters, tmp_path / "out")
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    for name, folder in zip("ab", adapters):
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    policy = SD3Policy(str(out), lora=LoraSettings(), **how)
    policy.load()
    whole = SD3Policy(str(merge(adapters, tmp_path / "whole", method="lora", weights=[0.5, 0.5])), **how)
    whole.load()
    x, t, cond = torch.randn(1, *policy.latent_shape()), torch.tensor([0.5]), policy.encode(["a"])
    with torch.no_grad():
        found = policy.velocity(x, t, cond)
        torch.testing.assert_close(whole.velocity(x, t, cond), found, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(_with_network(policy, pipe.transformer).velocity(x, t, cond), found, rtol=1e-4, atol=1e-5)


def _with_network(policy: Any, network: Any) -> Any:
    policy.network = network
    return policy


# ---------------------------------------------------------------------- refusals
REFUSED: list[tuple[str, Callable[[Path, Path], dict[str, Any]]]] = [
    (r"sum to 0", lambda base, _: {"inputs": [base, base], "weights": [1.0, -1.0]}),
    (r"2 inputs and 1 weights", lambda base, _: {"inputs": [base, base], "weights": [1.0]}),
    (r"give base, the model that all", lambda base, _: {"inputs": [base, base], "method": "ties"}),
    (r"density 1.5 must be", lambda base, _: {"inputs": [base], "density": 1.5}),
    (r"dtype 'int8' must be one of", lambda base, _: {"inputs": [base], "dtype": "int8"}),
    (r"is an adapter and .* a whole model", lambda base, other: {"inputs": [base, other / "adapter"]}),
    (r"method slerp is of two models, and there are 1 inputs", lambda base, _: {"inputs": [base], "method": "slerp"}),
    (r"method slerp is of whole models", lambda base, other: {"inputs": [other / "adapter"] * 2, "method": "slerp"}),
    (r"method lora adds adapters", lambda base, _: {"inputs": [base], "method": "lora"}),
    (r"not of the same architecture as .*: it lacks: .* and \d+ more", lambda base, other: {"inputs": [base, other / "small"]}),
    (r"it differs: .*is \[\d+, 64\], not \[\d+, 32\]", lambda base, other: {"inputs": [base, other / "wide"]}),
    (r"no such file or folder", lambda base, other: {"inputs": [other / "gone"]}),
    (r"is no folder here: `python -m lit_rl.prepare model", lambda base, _: {"inputs": [base], "method": "ties", "base": "owner/name"}),
    (r"is no model .*, no adapter and no checkpoint: found nothing", lambda base, other: {"inputs": [other / "empty"]}),
    (r"holds NaN in", lambda base, other: {"inputs": [base, other / "nan"]}),
]


def test_what_does_not_fit_gets_a_sentence_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    build_lm(tmp_path / "small", hidden=32, layers=1)
    build_lm(tmp_path / "wide", hidden=64)
    (tmp_path / "empty").mkdir()
    moved(CausalLM(str(base), lora=LoraSettings(rank=2)), tmp_path / "adapter", 0)
    broken = changed(base, tmp_path / "nan", 0)
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    for said, how in REFUSED:
        with pytest.raises(ConfigError, match=said):
            merge(out=tmp_path / "out", **how(base, tmp_path))
        assert sorted(tmp_path.iterdir()) == before, said

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([base], tmp_path / "out", progress=stop)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ConfigError, match="is there already"):
        merge([base], base)
