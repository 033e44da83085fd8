"""A stream, a column and media of a method's own go through join, exchange, split, minibatch, checkpoint and resume on two processes."""

from __future__ import annotations

from pathlib import Path

import torch
import toy_text
from comparing import ended
from pair import Pair


def test_what_a_method_notes_stays_with_its_rows(pair: Pair, tmp_path: Path) -> None:
    """The run itself compares each minibatch with its tokens; continued inside an iteration it has the media of the checkpoint."""
    model = str(toy_text.model_folder(tmp_path / "lm"))
    settings = dict(model=model, strategy="ddp", timeout=240)
    whole = pair.run("noted.fit", out=str(tmp_path / "whole"), save=True, **settings)
    assert sum(found["moved"] for found in whole) > 0 and all(found["pictures"] > 0 for found in whole)
    stored = torch.load(tmp_path / "whole" / "epoch=1-step=3.ckpt", weights_only=True)["rollout"]["ranks"]
    assert all(len(rank["media"]) == len(rank["tokens"]) and {"doubled"} <= rank["streams"].keys() for rank in stored.values())
    continued = pair.run("noted.fit", out=str(tmp_path / "cut"), ckpt_path=str(tmp_path / "whole" / "epoch=1-step=3.ckpt"), **settings)
    assert all(found["pictures"] > 0 for found in continued)
    a, b = ended(tmp_path / "whole")["weights"], ended(tmp_path / "cut")["weights"]
    assert all(torch.equal(a[name], b[name]) for name in a)
