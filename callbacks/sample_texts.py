"""A few answers of training and evaluation, with prompt and rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from callbacks.base import Media, Method, RLCallback
from callbacks.reported_samples import Shown, report_rows
from lit_rl.errors import ConfigError
from lit_rl.modules.reporting import logged_step
from lit_rl.policies.base import TokenPolicy
from lit_rl.types import Info, Prompts, Rollout, TokenRollout


class SampleTexts(RLCallback):
    """Shows answers every n iterations, and of every evaluation, to loggers that take texts (TensorBoard, the platform) and, of rollouts,
    on the console.

    The first process shows the first ones of its share.

    Args:
        max_texts: Answers shown at once.
        every_n_iterations: Of the rollouts; evaluations are always shown.
        console: Also print those of the rollouts.
        max_characters: Of a prompt or an answer; the middle of longer ones is left out.
    """

    def __init__(self, max_texts: int = 4, *, every_n_iterations: int = 10, console: bool = True, max_characters: int = 400) -> None:
        if min(max_texts, every_n_iterations, max_characters) < 1:
            raise ConfigError(f"SampleTexts {max_texts=}, {every_n_iterations=} and {max_characters=} must be at least 1")
        self.max_texts = max_texts
        self.every_n_iterations = every_n_iterations
        self.console = console
        self.max_characters = max_characters
        self._kept: list[tuple[str, Info]] = []

    # ------------------------------------------------------------------ training
    def on_phase_start(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """Begin anew with each rollout."""
        if name == "rollout":
            self._kept = []

    def on_rollout_chunk(self, trainer: L.Trainer, module: Method, media: Media, info: Sequence[Info], total: int) -> None:
        """Keep the first answers."""
        if trainer.is_global_zero and module.iteration % self.every_n_iterations == 0:
            self._kept += list(zip(media, info))[: self.max_texts - len(self._kept)]

    def on_rollout_chosen(self, trainer: L.Trainer, module: Method, rollout: TokenRollout) -> None:
        """Not everything that was said is trained on."""
        first = range(min(self.max_texts, len(rollout)))
        assert isinstance(module.policy, TokenPolicy)
        texts = [module.policy.decode(rollout.tokens[i, 1:][rollout.mask[i]].tolist()) for i in first]
        self._kept = []
        self.on_rollout_chunk(trainer, module, texts, rollout.info[: len(first)], len(rollout))

    def on_rollout_end(self, trainer: L.Trainer, module: Method, rollout: Rollout) -> None:
        """Show the answers of the rollout."""
        self._report(trainer, module, "rollout", rollout, rollout.rewards)
        rows = self._take(rollout.rewards)
        self._show(trainer, module, "samples/rollout", rows)
        if self.console:
            for prompt, text, scores in rows:
                trainer.print(f"  {prompt!r} -> {text!r}  {scores}")

    # ------------------------------------------------------------------ evaluation
    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin anew."""
        self._kept = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first answers."""
        if trainer.is_global_zero and isinstance(outputs, Mapping) and "texts" in outputs:
            self._kept += list(zip(outputs["texts"], outputs["prompts"].info))[: self.max_texts - len(self._kept)]

    def on_evaluation_end(self, trainer: L.Trainer, module: Method, prompts: Prompts, rewards: Mapping[str, Tensor]) -> None:
        """Show the answers of the evaluation."""
        if not trainer.sanity_checking:
            self._report(trainer, module, "evaluation", prompts, rewards)
            self._show(trainer, module, "samples/evaluation", self._take(rewards))

    # ------------------------------------------------------------------ to people
    def _report(self, trainer: L.Trainer, module: Method, source: str, prompts: Prompts, rewards: Mapping[str, Tensor]) -> None:
        shown = (Shown(row, prompt_text(info["prompt"]), text=text) for row, (text, info) in enumerate(self._kept))
        report_rows(trainer, module, source, shown, prompts, rewards)

    def _take(self, rewards: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
        """(prompt, answer, scores) of what was kept."""
        kept, self._kept = self._kept, []
        scores = ("  ".join(f"{name} {float(values[i]):.3g}" for name, values in rewards.items()) for i in range(len(kept)))
        return [(self._short(prompt_text(info["prompt"])), self._short(text), score) for (text, info), score in zip(kept, scores)]

    def _show(self, trainer: L.Trainer, module: Method, key: str, rows: Sequence[tuple[str, str, str]]) -> None:
        table = "| prompt | answer | scores |\n| --- | --- | --- |\n"
        table += "".join(f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), '<br>') for cell in row)} |\n" for row in rows)
        for logger in trainer.loggers if rows else ():
            board = getattr(logger, "experiment", None)
            if callable(add := getattr(board, "add_text", None)):
                add(key, table, logged_step(trainer, module))  # as the numbers that belong to them

    def _short(self, text: str) -> str:
        half = self.max_characters // 2
        return text if len(text) <= self.max_characters else f"{text[:half]} [...] {text[-half:]}"


def prompt_text(prompt: str | Sequence[Mapping[str, object]]) -> str:
    """A prompt as one text: of a conversation who said what, with `<image>` for each image."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {_said(turn.get('content', ''))}" for turn in prompt)


def _said(content: object) -> str:
    if not isinstance(content, list):
        return str(content)
    return "".join("<image>" if part["type"] == "image" else str(part["text"]) for part in content)
