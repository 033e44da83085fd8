"""Protocols of data: who serves which, and what is said where something is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import toy_method, toy_trainer

from datamodules.agent_tasks import AgentTasks
from datamodules.base import PromptDataModule
from datamodules.inpainting import Inpainting
from datamodules.mixed import PromptsAndPairs
from datamodules.pairs import PreferencePairs
from datamodules.prompts import PromptFiles
from datamodules.prompts_text import TextPrompts
from datamodules.rendered_text import RenderedText
from datamodules.supervised import SupervisedText
from lit_rl.errors import ConfigError
from lit_rl.modules.supervised import Supervised
from lit_rl.replay import sources
from lit_rl.replay.sources import ExampleSource, PairSource, PromptSource, SupervisedSource, TaskSource, TextSource, members, source_of

DATAMODULES = (PromptFiles, RenderedText, Inpainting, TextPrompts, AgentTasks, PreferencePairs, PromptsAndPairs, SupervisedText)


def test_the_table_names_the_datamodules_that_serve_each_protocol() -> None:
    rows = [line.split("|")[1:5] for line in str(sources.__doc__).splitlines() if line.startswith("| `")]
    told = {source.strip(" `"): {name.strip(" `") for name in names.split(",")} for source, _, _, names in rows}
    assert told.pop("PromptSource") == {"all"} and all(PromptSource in cls.__mro__ for cls in DATAMODULES)
    kinds = (ExampleSource, TextSource, TaskSource, PairSource, SupervisedSource)
    assert told == {kind.__name__: {cls.__name__ for cls in DATAMODULES if kind in cls.__mro__} for kind in kinds}


def test_a_datamodule_has_what_its_protocols_ask_for() -> None:
    """Attributes are set by constructors; of the methods none is left abstract."""
    for cls in DATAMODULES:
        assert not cls.__abstractmethods__
        for kind in (kind for kind in cls.__mro__ if kind.__module__ == sources.__name__):
            assert all(hasattr(cls, name) for name in members(kind) if name in vars(kind)), (cls, kind)


def test_a_datamodule_of_ones_own_need_not_inherit() -> None:
    own = SimpleNamespace(prompts=list, prompt_ids=list, max_prompt_length=4)
    assert source_of(own, TextSource, who="GRPO", use="") is own
    wanted = r"^data: SimpleNamespace has no `pair_ids`, which DPO asks for: use datamodules\.pairs\.PreferencePairs, or .* with pair_ids, "
    with pytest.raises(ConfigError, match=wanted):
        source_of(own, PairSource, who="DPO", use="datamodules.pairs.PreferencePairs")


def test_a_warm_up_needs_images_to_imitate(tmp_path: Path) -> None:
    class Prompts(PromptDataModule):
        """Prompts alone."""

    method = toy_method(supervised=Supervised(warmup_steps=1))
    with pytest.raises(ConfigError, match=r"Prompts has no `examples`, which model\.supervised asks for: use datamodules\.rendered_text"):
        toy_trainer(tmp_path).fit(method, Prompts([{"prompt": "1"}] * 4))


def test_a_prompt_module_that_only_names_prompts_serves_no_examples() -> None:
    with pytest.raises(ConfigError, match="has no `supervised_ids`, which SFT asks for"):
        source_of(PromptDataModule(), SupervisedSource, who="SFT", use="datamodules.supervised.SupervisedText")
