"""Evaluation sets beside the run's own held-out prompts: images in folders, and UniGenBench's judge on those that name it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from callbacks.base import RLCallback, check_alone
from callbacks.image_writer import to_image
from lit_rl.checkpoints.contents import Checkpoint
from lit_rl.errors import ConfigError
from lit_rl.evaluation.instructions import Templates
from lit_rl.evaluation.judging import Judging, Question, judge_client, unigenbench_judge
from lit_rl.evaluation.sets import EvaluationSet, Item, read_sets
from lit_rl.evaluation.unigenbench import SEPARATORS, Language, Unreadable, Verdict, losses, metrics, statistics, write_results
from lit_rl.modules.flow import LitFlow
from lit_rl.modules.pictures import guided, render_keyed
from lit_rl.modules.reporting import logged_step
from lit_rl.net.environment import EVALUATION, variable_of
from lit_rl.ranks import all_or_none, gather_objects
from lit_rl.rewards.judges.client import Judge
from lit_rl.samplers.flow import SDE
from lit_rl.types import Prompts


@dataclass(frozen=True, kw_only=True)
class SetDefaults:
    """Settings of the sets that have none of their own.

    Args:
        cfg_scale: Weight of guidance; 1 and less ask for the prompt alone. Default: `model.evaluation.guidance_scale`.
        num_steps: Denoising steps. Default: `model.evaluation.num_steps`.
    """

    cfg_scale: float | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if (self.cfg_scale or 0) < 0 or (self.num_steps is not None and self.num_steps < 1):
            raise ConfigError(f"defaults: cfg_scale={self.cfg_scale} must be at least 0 and num_steps={self.num_steps} at least 1")


class EvaluationSets(RLCallback):
    """Renders the sets of an evaluation YAML at the end of every validation, and asks UniGenBench's judge about those with `scoring`.

    Each process renders its share and asks about it itself, while the next images are made. Writes FOLDER/step_N/NAME/INDEX.DUPLICATE.png
    with N iterations over, beside them `unigenbench_scores.csv` and `unigenbench_summary.json`, and logs `eval/NAME/overall_accuracy`,
    `success_rate`, each dimension, and how many images are missing, unanswered or unreadable. The same in `validate`.

    Args:
        config: The evaluation YAML, see `lit_rl.evaluation.sets`; by default the environment's EVAL_DATASET_CONFIG. Without either there
            is nothing to do.
        defaults: Guidance and steps of sets that say nothing; by default those of `model.evaluation`.
        sde: Draw images with this stochastic sampler; by default deterministic ones.
        judge: Address and settings of the judge; by default the environment's UNIGENBENCH_API_URL, else port 8000 of this machine.
        templates: The judge's instructions.
        unreadable: What an answer that says no scores counts as, or none at all: `missing` leaves it out, `wrong` takes every testpoint
            as not fulfilled, as the authors do.
        max_images: Images of a set that loggers show, those of its first prompts; 0 = none.
        folder: Place of the images; the command line fills in `eval` in the run's folder.
    """

    def __init__(
        self,
        config: str | None = None,
        *,
        defaults: SetDefaults | None = None,
        sde: SDE | None = None,
        judge: Judge | None = None,
        templates: Templates | None = None,
        unreadable: Unreadable = "missing",
        max_images: int = 32,
        folder: str | None = None,
    ) -> None:
        if max_images < 0:
            raise ConfigError(f"EvaluationSets max_images={max_images} must be at least 0")
        self.config, self.defaults, self.sde = config, defaults or SetDefaults(), sde
        self.judge, self.templates, self.unreadable = judge or unigenbench_judge(), templates or Templates(), unreadable
        self.max_images, self.folder = max_images, Path(folder or "eval")
        self.sets: list[EvaluationSet] = []
        self._items: list[list[Item]] = []
        self._instructions: dict[Language, str] = {}
        self._judging: Judging | None = None
        self._asked: list[str] = []  # names of the sets of what the judge was asked
        self._missing: list[tuple[str, Verdict]] = []
        self._shown: dict[str, list[tuple[Tensor, str]]] = {}
        self._restored = 0

    # ------------------------------------------------------------------ before any model is loaded
    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Read the sets, and look whether the judge is there. What is wrong stops all processes."""
        config = self.config or os.environ.get(variable_of(EVALUATION, "config"))
        if config is None or stage not in ("fit", "validate"):
            return
        if not isinstance(module, LitFlow):
            raise ConfigError(f"EvaluationSets renders images, which {type(module).__name__} does not make: leave it out")
        check_alone(trainer, EvaluationSets, "name all sets in its YAML")
        self.sets = read_sets(config)
        self._items = [one.items() for one in self.sets]
        languages = {one.scoring.language for one in self.sets if one.scoring is not None}
        self._instructions = {language: self.templates.read(language) for language in sorted(languages)}
        module.further_evaluation = [
            [MappingProxyType({"prompt": item.row.prompt, "evaluation_set": i}) for item in items] for i, items in enumerate(self._items)
        ]
        if languages:
            client = judge_client(self.judge)
            all_or_none(lambda: client.setup(rank=trainer.global_rank, world_size=trainer.world_size))
            self._judging = Judging(client)

    # ------------------------------------------------------------------ images
    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin anew."""
        self._asked, self._missing, self._shown = [], [], {}

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Render a batch of a set, write its images and ask about them."""
        if outputs is not None or trainer.sanity_checking:
            return
        assert isinstance(module, LitFlow) and isinstance(batch, Prompts)
        number = batch.info[0]["evaluation_set"]
        one, items = self.sets[number], self._items[number]
        chosen = [items[max(0, i)] for i in batch.group.tolist()]
        keys = [(module.evaluation.seed, "eval", item.seed) for item in chosen]
        scales = (one.cfg_scale, self.defaults.cfg_scale)
        scale = next((scale for scale in scales if scale is not None), module.evaluation.guidance_scale)
        steps = one.num_steps or self.defaults.num_steps or module.evaluation.num_steps
        with guided(module.policy, scale), trainer.precision_plugin.forward_context():
            images, finite = render_keyed(module, batch.info, keys, num_steps=steps, sde=self.sde)
        folder = self._folder(trainer, module) / one.name
        folder.mkdir(parents=True, exist_ok=True)
        for i, item in enumerate(chosen):
            if batch.group[i] >= 0:  # the others fill up the last batch
                self._take(one, item, images[i] if finite[i] else None, folder)

    def _take(self, one: EvaluationSet, item: Item, image: Tensor | None, folder: Path) -> None:
        """Write an image and ask about it; None is one that is not finite."""
        if image is not None:
            to_image(image).save(folder / item.file)
            if len(shown := self._shown.setdefault(one.name, [])) < self.max_images:
                shown.append((image.clone(), item.row.prompt))
        if one.scoring is None:
            if image is None:
                rank_zero_warn(f"evaluation set {one.name}: the image of {item.row.place} is not finite and is left out")
            return
        points, descriptions = one.testpoints(item.row)
        verdict = Verdict(item.row.index, item.duplicate, item.row.prompt, item.file, points, "no_image", reason="the image is not finite")
        if image is None:
            self._missing.append((one.name, verdict))
            return
        assert self._judging is not None
        self._asked.append(one.name)
        self._judging.submit(image, Question(verdict, self._instructions[one.scoring.language], descriptions))

    # ------------------------------------------------------------------ verdicts
    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Wait for the judge, log the accuracies, and write the files of each set. Collective."""
        if not self.sets or trainer.sanity_checking:
            return
        assert isinstance(module, LitFlow)
        here = [*zip(self._asked, self._judging.gather() if self._judging else ()), *self._missing]
        verdicts = [pair for rank in gather_objects(here) for pair in rank]
        for one in self.sets:
            if one.scoring is not None:
                self._report(trainer, module, one, [verdict for name, verdict in verdicts if name == one.name])
        self._show(trainer, module)

    def _report(self, trainer: L.Trainer, module: LitFlow, one: EvaluationSet, verdicts: Sequence[Verdict]) -> None:
        assert one.scoring is not None
        separator, lost = SEPARATORS[one.scoring.language], losses(verdicts)
        numbers = metrics(one.name, verdicts, unreadable=self.unreadable, separator=separator)
        counts = {f"eval/{one.name}/{key}": float(lost[key]) for key in ("missing_images", "unanswered", "unreadable")}
        module.report(numbers | counts, bar=[f"eval/{one.name}/overall_accuracy"])
        told = statistics(verdicts, unreadable=self.unreadable, separator=separator)
        folder = self._folder(trainer, module) / one.name
        if lost["judged"] < lost["images"]:
            reason = next((verdict.reason for verdict in verdicts if verdict.status != "judged"), "")
            rank_zero_warn(
                f"evaluation set {one.name}: of {lost['images']} images {lost['missing_images']} are missing, {lost['unanswered']} have no "
                f"answer and {lost['unreadable']} one without scores, which count as {self.unreadable}; the first: {reason}. "
                f"{folder}/unigenbench_scores.csv names them"
            )
        if trainer.is_global_zero:
            write_results(folder, verdicts, told | lost | {"language": one.scoring.language, "unreadable_counts_as": self.unreadable})
            rank_zero_info(f"evaluation set {one.name}: {told['total_correct']} of {told['total_count']} testpoints; see {folder}")

    def _folder(self, trainer: L.Trainer, module: LitFlow) -> Path:
        """The place of this evaluation, by the iterations that are over."""
        over = module.iteration + 1 if trainer.state.fn == "fit" else self._restored
        return self.folder / f"step_{max(0, over)}"

    def _show(self, trainer: L.Trainer, module: LitFlow) -> None:
        """Images of the first process to loggers that take some."""
        for name, shown in self._shown.items():
            images, captions = [to_image(image) for image, _ in shown], [prompt for _, prompt in shown]
            for logger in trainer.loggers if trainer.is_global_zero else ():
                if hasattr(logger, "log_image"):
                    logger.log_image(key=f"eval/{name}", images=images, step=logged_step(trainer, module), caption=captions)

    # ------------------------------------------------------------------ its end, and checkpoints
    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Checkpoint) -> None:
        """Note the iterations that are over, after which `validate` names its folder."""
        self._restored = int(checkpoint["epoch"]) + 1 - getattr(module, "warmup_epochs", 0)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """End the judge's loop."""
        self._close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Do the same: Lightning calls no `teardown` after an error."""
        self._close()

    def _close(self) -> None:
        judging, self._judging = self._judging, None
        if judging is not None:
            judging.close()
