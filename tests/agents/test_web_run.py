"""An agent trains in a real browser: two iterations on a page of MiniWoB++ and an evaluation, of which no browser is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from toy_text import weights

from benchmarks.web_agent import HEAD, Places, learner, tasks_of, train
from lit_rl.envs.actions import ActionError
from lit_rl.envs.browser import find_browser
from lit_rl.errors import ConfigError

try:
    find_browser()
    HERE = True
except ConfigError:
    HERE = False


def test_nine_places_are_clicks_below_the_instruction() -> None:
    codec = Places()
    actions = [codec.read(str(i), None) for i in range(9)]
    assert [codec.write(action, None) for action in actions] == [str(i) for i in range(9)]
    assert {round(action.x or 0) for action in actions} == {27, 80, 133} and min(action.y or 0 for action in actions) > HEAD
    for text in ("", "9", "12", "x"):
        with pytest.raises(ActionError, match="is no place"):
            codec.read(text, None)


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="no browser here: apt-get install chromium-headless-shell")
def test_clicks_on_pages_move_weights_and_leave_no_browser(tmp_path: Path) -> None:
    """Success on held-out seeds is measured by `benchmarks.web_agent`, which takes minutes."""
    torch.manual_seed(0)
    made = learner(tmp_path / "model", tasks=2, group_size=4)
    made.episodes.manner = replace(made.episodes.manner, parse_penalty=0.1)  # so that siblings differ without a success
    before: list[torch.Tensor] = []
    made.on_train_start = lambda: before.append(weights(made))  # type: ignore[method-assign]
    scores = train(tmp_path, made, tasks_of(tmp_path, "click-tab", held_out=4), iterations=2)
    assert all(score in (0, 0.25, 0.5, 0.75, 1) for score in scores)
    assert made.rollout_metrics["episodes/lost"] == 0 and made.rollout_metrics["samples"] == 8
    assert len(before) == 1 and not torch.equal(before[0], weights(made))
    counts = made.episodes.worlds.counts
    assert counts["opened"] == counts["closed"] == 24 and not counts["leaked"]
    assert psutil.Process().children(recursive=True) == []
