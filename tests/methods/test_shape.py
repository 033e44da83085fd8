"""How much one has to know to read a method: storeys of its classes, options of its constructor. See also `benchmarks.house`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.house import arguments, depth
from lit_rl.methods.diffusion_nft import AWM, DiffusionNFT
from lit_rl.methods.dpo import DPO
from lit_rl.methods.flow_grpo import DanceGRPO, FlowGRPO, FlowGRPOFast, GRPOGuard, MixGRPO
from lit_rl.methods.grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePP
from lit_rl.methods.gspo_mixed import MixedGSPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.sft import SFT
from lit_rl.modules.base import LitRL

METHODS: list[type[LitRL[Any]]] = [SFT, DPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePP, CISPO, DAPO, PPO, MixedGSPO]
FLOWS: list[type[LitRL[Any]]] = [FlowGRPO, FlowGRPOFast, MixGRPO, DanceGRPO, GRPOGuard, DiffusionNFT, AWM]


@pytest.mark.parametrize("method", FLOWS)
def test_a_flow_method_is_three_storeys_above_the_base_at_most(method: type[LitRL[Any]]) -> None:
    assert depth(method) <= 3


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_four_storeys_above_the_base_at_most(method: type[LitRL[Any]]) -> None:
    assert depth(method) <= 4


@pytest.mark.parametrize("method", [*METHODS, FlowGRPO, GRPOGuard, DiffusionNFT, AWM])
def test_a_constructor_has_twenty_options_at_most(method: type[LitRL[Any]]) -> None:
    """Those of `**kwargs` included, as the command line resolves them."""
    names = arguments(method)
    assert len(names) <= 20, sorted(names)
