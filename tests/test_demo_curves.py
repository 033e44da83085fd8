"""The demo's summary of its runs, by hand."""

import json
from pathlib import Path

from lit_rl.demo.curves import ACCURACY, Curve, over_images, remember, summarize

CURVES = {
    "images": Curve([701, 702, 704], [96, 96, 48]),
    ACCURACY: Curve([700, 702, 704], [0.25, 0.5, 0.8]),
    "val/ink_similarity": Curve([700, 704], [0.6, 0.7]),
}


def test_evaluations_stand_at_the_images_before_them() -> None:
    """The warm-up's comes after none, the one of step 702 after 96 + 96, the last after 48 more."""
    assert over_images(CURVES, ACCURACY) == ([0, 192, 240], [0.25, 0.5, 0.8])
    assert over_images(CURVES, "val/ink_similarity") == ([0, 240], [0.6, 0.7])


def test_summary_has_first_and_last_evaluation_of_each_score() -> None:
    scores = {"held_out_accuracy": ACCURACY, "held_out_ink_similarity": "val/ink_similarity"}
    summary = summarize(CURVES, scores, seconds={"warmup": 1.26, "rl": 2.0}, seed=3)
    assert summary["held_out_accuracy"] == {"after_warmup": 0.25, "after_rl": 0.8}
    assert summary["held_out_ink_similarity"] == {"after_warmup": 0.6, "after_rl": 0.7}
    assert (summary["images_trained"], summary["seconds"], summary["seed"]) == (240, {"warmup": 1.3, "rl": 2.0}, 3)


def test_runs_of_other_seeds_and_methods_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "curves.json"
    for method, seed in (("A", 0), ("A", 1), ("B", 0), ("A", 0)):
        known = remember(file, method, seed, CURVES)
    assert {method: list(seeds) for method, seeds in known.items()} == {"A": ["0", "1"], "B": ["0"]}
    assert json.loads(file.read_text()) == known
