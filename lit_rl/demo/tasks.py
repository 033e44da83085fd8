"""Data, panels and settings of the demos' tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_rl.demo.curves import ACCURACY, Stages
from lit_rl.demo.pictures import Panel, evaluated_numbers, filled_signs, written_numbers


@dataclass(frozen=True)
class Run:
    """One method's run of a task: name, YAML and output folder, which the YAML names too."""

    title: str
    config: str
    out: Path


@dataclass(frozen=True)
class Task:
    """prepare(folder, seed) writes the model and whatever else the YAMLs read there; scores: tags of the held-out numbers by their name
    in summary.json; panels(folder, held-out accuracy): titled pictures of what was learned; curves, comparison: files of all runs of
    the task."""

    model: str
    warmup: str
    prepare: Callable[[Path, int], None]
    runs: Mapping[str, Run]
    scores: Mapping[str, str]
    panels: Callable[[Path, Stages], list[Panel]]
    curves: Path
    comparison: Path
    against: str = "a live OCR server"
    judge: bool = False
    """A scripted judge runs beside the OCR server, see `lit_rl.demo.judge`."""
    predicts: bool = True
    """Panels show predictions; otherwise images of evaluation sets."""


def prepare_text(out: Path, seed: int) -> None:
    """Prompts and pictures of numbers."""
    from lit_rl.miniatures.images import build_sd3

    build_sd3(
        out / "model",
        height=16,
        width=16,
        factor=4,
        patch_size=1,
        hidden=96,
        heads=3,
        qk_norm=None,
        text_hidden=32,
        t5_hidden=None,
        shift=1.0,
    )


def prepare_fill(out: Path, seed: int) -> None:
    """Signs with holes, masks and references."""
    from lit_rl.demo.signs import HEIGHT, WIDTH, write_signs
    from lit_rl.miniatures.images import build_flux, build_siglip

    write_signs(out, lines_share=0.5, wrong_ink_share=0.3, seed=seed)
    build_siglip(out / "siglip")
    build_flux(
        out / "model",
        height=HEIGHT,
        width=WIDTH,
        factor=2,
        image_channels=3,
        hidden=96,
        heads=3,
        layers=2,
        single_layers=2,
        fill=True,
        text_hidden=32,
        t5_hidden=64,
    )


def prepare_deepgen(out: Path, seed: int) -> None:
    """Prompts and pictures of numbers, and the held-out numbers as an evaluation set with a judge."""
    from datamodules.rendered_text import RenderedText
    from lit_rl.miniatures.deepgen import build_deepgen

    build_deepgen(
        out / "model",
        height=16,
        width=16,
        factor=4,
        patch_size=1,
        shift=1.0,
        qk_norm=None,
        hidden=96,
        heads=3,
        layers=4,
        language_hidden=48,
        language_layers=3,
        language_std=0.07,
        connector_hidden=96,
        adapter_rank=None,
    )
    judged = json.dumps({"Testpoints": ["Text Generation"], "Testpoint Description": ["the number in quotes, and nothing else"]})
    rows = [{"prompt": row["prompt"], "sub_dims": judged} for row in RenderedText(eval_repeats=1).held_out]
    (out / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "eval.yaml").write_text("datasets: [{name: numbers, path: numbers.jsonl, duplicates: 5, scoring: unigenbench/en}]\n")


TASKS = {
    "text": Task(
        model="SD3",
        warmup="pictures of numbers, most of which have lines printed over them",
        prepare=prepare_text,
        runs={
            "grpo": Run("Flow-GRPO", "configs/demo/flow_grpo_ocr.yaml", Path("outputs/demo")),
            "nft": Run("DiffusionNFT", "configs/demo/diffusion_nft_ocr.yaml", Path("outputs/demo-nft")),
        },
        scores={"held_out_accuracy": ACCURACY},
        panels=written_numbers,
        curves=Path("outputs/demo-curves.json"),
        comparison=Path("outputs/demo-methods.png"),
    ),
    "fill": Task(
        model="FLUX.1-Fill",
        warmup="signs, many of which have lines printed over the number or the wrong ink",
        prepare=prepare_fill,
        runs={
            "grpo": Run("Flow-GRPO", "configs/demo/flow_grpo_fill.yaml", Path("outputs/demo-fill")),
            "nft": Run("DiffusionNFT", "configs/demo/diffusion_nft_fill.yaml", Path("outputs/demo-fill-nft")),
        },
        scores={"held_out_accuracy": ACCURACY, "held_out_ink_similarity": "val/ink_similarity"},
        panels=filled_signs,
        curves=Path("outputs/demo-fill-curves.json"),
        comparison=Path("outputs/demo-fill-methods.png"),
    ),
    "deepgen": Task(
        model="DeepGen",
        warmup="pictures of numbers, nearly half of which have lines printed over them",
        prepare=prepare_deepgen,
        runs={"grpo": Run("Flow-GRPO", "configs/demo/flow_grpo_deepgen.yaml", Path("outputs/demo-deepgen"))},
        scores={"held_out_accuracy": "eval/numbers/overall_accuracy"},
        panels=evaluated_numbers,
        curves=Path("outputs/demo-deepgen-curves.json"),
        comparison=Path("outputs/demo-deepgen-methods.png"),
        against="an OCR server and a judge of pairs",
        judge=True,
        predicts=False,
    ),
}
