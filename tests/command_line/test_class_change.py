"""A class that takes another's place starts from its own defaults."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import jsonargparse._typehints as typehints
import pytest
import yaml
from toy import toy_config

from lit_rl.command_line import class_change
from lit_rl.command_line.class_change import definer, keeps, parser_with_presets, presets, replaced_components, start_anew
from lit_rl.doctor.runs import parse
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.methods.grpo import DrGRPO


class Surrogate(ABC):  # noqa: B024
    """A component."""


@dataclass
class Clip(Surrogate):
    """A range for ratios of tokens."""

    low: float = 0.2
    high: float = 0.2


@dataclass
class SequenceClip(Surrogate):
    """A range for ratios of whole answers."""

    low: float = 3e-4
    high: float = 4e-4


class Method(FlowGRPO):
    """A method that has a component."""

    defines: ClassVar[dict[str, type]] = {"surrogate": Clip}

    def __init__(self, policy: Any, *, surrogate: Surrogate | None = None, bonus: float = 0.5, **kwargs: Any) -> None:
        super().__init__(policy, **kwargs)


class Relative(Method):
    """Another by its component."""

    defines: ClassVar[dict[str, type]] = {"surrogate": SequenceClip}

    def __init__(self, policy: Any, *, surrogate: Surrogate | None = None, **kwargs: Any) -> None:
        super().__init__(policy, surrogate=surrogate or SequenceClip(), **kwargs)


@final
@dataclass
class Drawing:
    """How it draws."""

    surrogate: Surrogate | None = None
    temperature: float = 1.0
    top_k: int = 0
    greedy: bool = True


class Drawn(Method):
    """A method with a component that has one."""

    def __init__(self, policy: Any, *, drawing: Drawing | None = None, **kwargs: Any) -> None:
        super().__init__(policy, **kwargs)


HERE = "test_class_change"


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """Options of a run with a component whose range is set."""
    surrogate = {"class_path": f"{HERE}.Clip", "init_args": {"low": 0.2, "high": 0.28}}
    config = toy_config(tmp_path, surrogate=surrogate, bonus=0.75, group_size=6)
    config["model"]["class_path"] = f"{HERE}.Method"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "run.yaml")]


def test_jsonargparse_asks_us() -> None:
    """It is a private name of jsonargparse's."""
    class_change.install()
    assert getattr(typehints, class_change.HOOK) is start_anew
    assert getattr(typehints.ActionTypeHint, class_change.PARSER) is parser_with_presets


def test_another_component_starts_from_its_own_defaults(run: list[str]) -> None:
    """The range was 0.2 ... 0.28, a thousand times that of whole answers."""
    model = parse([*run, "--model.surrogate", f"{HERE}.SequenceClip"]).model.init_args
    assert model.surrogate.init_args.as_dict() == {"low": 3e-4, "high": 4e-4} and (model.group_size, model.bonus) == (6, 0.75)


def test_what_is_said_of_the_new_class_holds(run: list[str], tmp_path: Path) -> None:
    said = parse([*run, "--model.surrogate", f"{HERE}.SequenceClip", "--model.surrogate.high", "0.01"]).model.init_args
    assert said.surrogate.init_args.as_dict() == {"low": 3e-4, "high": 0.01}
    overlay = {"model": {"init_args": {"surrogate": {"class_path": f"{HERE}.SequenceClip", "init_args": {"low": 0.02}}}}}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    laid_over = parse([*run, "--config", str(tmp_path / "overlay.yaml")]).model.init_args
    assert laid_over.surrogate.init_args.as_dict() == {"low": 0.02, "high": 4e-4}


def test_the_same_class_named_again_keeps_its_options(run: list[str]) -> None:
    assert parse([*run, "--model.surrogate", f"{HERE}.Clip"]).model.init_args.surrogate.init_args.high == 0.28


def test_another_optimizer_has_its_own_rate(run: list[str]) -> None:
    optimizer = parse([*run, "--model.optimizer", "torch.optim.SGD"]).model.init_args.optimizer
    assert optimizer.class_path == "torch.optim.SGD" and optimizer.init_args.lr == 0.001


def test_another_method_keeps_what_both_mean_alike_but_not_what_defines_it(run: list[str]) -> None:
    model = parse([*run, "--model", f"{HERE}.Relative"]).model
    assert model.class_path == f"{HERE}.Relative" and model.init_args.surrogate is None
    options = model.init_args
    assert (options.group_size, options.bonus, options.policy.class_path, options.optimizer.init_args.lr) == (
        6,
        0.75,
        "toy.ToyPolicy",
        0.01,
    )


def test_options_that_two_methods_define_each_for_itself_are_not_taken_over() -> None:
    from lit_rl.methods.diffusion_nft import DiffusionNFT

    assert keeps(FlowGRPO, DiffusionNFT, "policy"), "it cannot be built without"
    assert keeps(FlowGRPO, DiffusionNFT, "num_steps"), "of the module that both are"
    assert not keeps(FlowGRPO, DiffusionNFT, "kl") and not keeps(FlowGRPO, DiffusionNFT, "timestep_fraction")
    assert definer(Relative, "bonus") is Method and definer(Relative, "nonsense") is None


def test_what_is_left_out_is_said(run: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        parse([*run, "--model.surrogate", f"{HERE}.SequenceClip"])
    assert "SequenceClip takes the place of Clip and starts from its own defaults; left out: high: 0.28" in caplog.text


def test_a_method_whose_defining_component_is_replaced_says_so(run: list[str]) -> None:
    options = parse([*run, "--model", f"{HERE}.Relative", "--model.surrogate", f"{HERE}.Clip"]).model.init_args
    (said,) = replaced_components(Relative, options)
    assert "Relative is defined by surrogate=SequenceClip, and this run sets model.surrogate to Clip" in said
    assert not replaced_components(Method, options) and not replaced_components(Relative, {"surrogate": None})


# ---------------------------------------------------------------------- shipped runs
GRPO = ["--config", str(Path(__file__).parents[2] / "configs/grpo/qwen25_7b_gsm8k.yaml")]


def test_a_shipped_range_of_tokens_is_none_of_answers() -> None:
    """0.2 with a dual bound of 3, of whole answers a thousand times too wide."""
    surrogate = parse([*GRPO, "--model.surrogate", "lit_rl.losses.surrogates.SequenceClip"]).model.init_args.surrogate.init_args
    assert (surrogate.low, surrogate.high, surrogate.dual) == (3e-4, 4e-4, None)


def test_gspo_over_a_run_of_grpo_is_gspo() -> None:
    model = parse([*GRPO, "--model", "lit_rl.methods.grpo.GSPO"]).model.init_args
    assert model.surrogate is None and model.aggregation == "seq-mean-token-mean"
    assert (model.group_size, model.answers.chunk, model.kl.coef, model.policy.init_args.pretrained) == (5, 160, 0.001, "Qwen/Qwen2.5-7B")


@pytest.mark.parametrize(
    ("method", "component"),
    [
        ("GSPO", "surrogate=lit_rl.losses.surrogates.Clip"),
        ("CISPO", "surrogate=lit_rl.losses.surrogates.Sapo"),
        ("RLOO", "credit=lit_rl.credit.rules.Group"),
        ("DrGRPO", "credit=lit_rl.credit.rules.PassAtK"),
        ("ReinforcePP", "credit=lit_rl.credit.rules.Group"),
    ],
)
def test_a_relative_with_another_component_says_that_it_is_none(method: str, component: str) -> None:
    from lit_rl.methods import grpo

    options = parse([*GRPO, "--model", f"lit_rl.methods.grpo.{method}", f"--model.{component}"]).model.init_args
    (said,) = replaced_components(getattr(grpo, method), options)
    assert said.startswith(f"{method} is defined by ") and component.rpartition(".")[2] in said


# ---------------------------------------------------------------------- components that a relative fills in
FLOW, POINTS, TOKENS = (f"lit_rl.losses.{name}" for name in ("step_surrogates", "point_surrogates", "surrogates"))
RULES = "lit_rl.credit.rules"


def relative(folder: Path, method: str, *argv: str, **components: Any) -> Any:
    """The init_args of a run of `method`."""
    config = toy_config(folder, **components)
    config["model"]["class_path"] = f"lit_rl.methods.{method}"
    if method.startswith("grpo"):
        for name in ("num_steps", "evaluation"):
            del config["model"]["init_args"][name]
        config["model"]["init_args"]["policy"] = {"class_path": "lit_rl.policies.causal_lm.CausalLM", "init_args": {"pretrained": "x"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return parse(["--config", str(folder / "run.yaml"), *argv]).model.init_args


PARTIAL = [
    ("flow_grpo.FlowGRPOFast", "surrogate", f"{FLOW}.Clip", {"low": 2e-5}, {"low": 2e-5, "high": 1e-5}),
    ("grpo.DAPO", "surrogate", f"{TOKENS}.Clip", {"low": 0.1}, {"low": 0.1, "high": 0.28}),
    ("diffusion_nft.AWM", "surrogate", f"{POINTS}.Matching", {"low": 0.02}, {"low": 0.02, "high": 0.01, "power": 0.25}),
    ("diffusion_nft.DiffusionNFT", "surrogate", f"{POINTS}.NFT", {"beta": 0.1}, {"beta": 0.1, "mode": "normal"}),
    ("grpo.DrGRPO", "credit", f"{RULES}.Group", {}, {"std": False}),
    ("grpo.DrGRPO", "credit", f"{RULES}.Group", {"std": True}, {"std": True}),
    ("grpo.GRPO", "surrogate", f"{TOKENS}.Clip", {"low": 0.1}, {"low": 0.1, "high": 0.2}),
    ("grpo.DAPO", "surrogate", f"{TOKENS}.SequenceClip", {"low": 1e-4}, {"low": 1e-4, "high": 4e-4}),
    ("grpo.DrGRPO", "credit", f"{RULES}.PassAtK", {}, {"std": True}),
    ("flow_grpo.FlowGRPOFast", "surrogate", f"{FLOW}.Guard", {"low": 3e-6}, {"low": 3e-6, "high": 2e-6}),
]
"""Method, option, class and settings of a run, and some of what becomes of them."""


@pytest.mark.parametrize(("method", "option", "path", "given", "wanted"), PARTIAL)
def test_a_component_named_in_part_keeps_the_relatives_other_settings(
    tmp_path: Path, method: str, option: str, path: str, given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """In a YAML and on the command line; another class starts from its own defaults."""
    words = [f"--model.{option}={path}", *(f"--model.{option}.{name}={value}" for name, value in given.items())]
    by_file = relative(tmp_path, method, **{option: {"class_path": path, "init_args": given}})[option]
    by_words = relative(tmp_path, method, *words)[option]
    for found in (by_file, by_words):
        assert found.class_path == path and wanted.items() <= found.init_args.as_dict().items()


def test_settings_alone_are_those_of_the_relatives_class(tmp_path: Path) -> None:
    found = relative(tmp_path, "flow_grpo.FlowGRPOFast", "--model.surrogate.low=2e-5").surrogate
    assert (found.class_path, found.init_args.as_dict()) == (f"{FLOW}.Clip", {"low": 2e-5, "high": 1e-5})


def test_a_later_file_changes_what_an_earlier_one_set_and_no_more(tmp_path: Path) -> None:
    """Not back to the relative's own."""
    both = {"class_path": f"{FLOW}.Clip", "init_args": {"low": 3e-5, "high": 4e-5}}
    found = relative(
        tmp_path, "flow_grpo.FlowGRPOFast", f"--model.surrogate={FLOW}.Clip", "--model.surrogate.low=2e-5", surrogate=both
    ).surrogate
    assert found.init_args.as_dict() == {"low": 2e-5, "high": 4e-5}


def test_another_method_leaves_the_relatives_settings_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody wrote them, so nothing is said of them."""
    found = relative(tmp_path, "flow_grpo.FlowGRPOFast", "--model=lit_rl.methods.flow_grpo.FlowGRPO").surrogate
    assert found is None and "surrogate" not in "".join(capsys.readouterr())


def test_presets_are_written_as_a_run_would() -> None:
    assert presets(FlowGRPO) == {} and presets(None) == {}
    path = f"{RULES}.Group"
    assert presets(DrGRPO) == {"credit": {"class_path": path, "init_args": {"std": False, "min_std": 0.0}}}
