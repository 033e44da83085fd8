"""Base of the datamodules of texts: rows from files, checked with the policy's tokenizer before training starts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from datamodules.base import PromptDataModule
from datamodules.lazy import ImageCache
from datamodules.picture_files import read_picture
from datamodules.text_answers import template_of
from datamodules.text_files import Fields, Rows, TextFile, complain, read_rows
from datamodules.text_images import Source, check_places, sizes_of, with_images
from datamodules.text_paths import Paths, find_files, split_files
from datamodules.verdicts import WORTH, Verdict, keep, named, recall
from lit_rl.errors import ConfigError
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.tokenizer import fingerprint
from lit_rl.ranks import gather_objects, place
from lit_rl.types import Info

TOGETHER = 1000
"""Rows that are tokenized at a time."""

STATE = {"paths", "limits", "max_tokens", "held_out_pairs"}
"""Attributes that say nothing about what becomes of a row."""

SPLITS = {"train": "train_prompts", "val": "held_out", "predict": "to_predict"}
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("val",), "predict": ("predict", "val")}


class TextData(PromptDataModule):
    """Rows of text files. Every row has an `id` (its own, or file name and number) and a `data_source` (its own, or the file's name).

    Args:
        train: File, list of files, folder or pattern (`data/*.parquet`), of `.jsonl`, `.json` or `.parquet`. Of a folder whose files are
            named after splits only those of training are taken.
        val: Held-out rows, likewise; default: those of the folder that `train` names, if any file there is named val, dev or test.
        predict: Rows that `predict` answers; default: the held-out ones.
        max_train: Train on only so many rows, from the start.
        max_val: Evaluate on only so many rows, from the start.
        data_source: For rows that name none: by it scores are reported and rule rewards chosen. Default: the file's name without suffix.
        images_key: Field that holds a row's images, for models that read them: paths, bytes or pictures. `<image>` in a text, or a part
            {"type": "image"} of a message, is where one stands; else they stand before the first message of the user.
        image_folder: Relative paths of images count from it; default: from the folder of the file that names them.
        chat: A prompt that is a string is what a user says and goes through the chat template; otherwise it is taken as it is.
        kwargs: See `PromptDataModule`.
    """

    def __init__(
        self,
        *,
        train: Paths | None = None,
        val: Paths | None = None,
        predict: Paths | None = None,
        max_train: int | None = None,
        max_val: int | None = None,
        data_source: str | None = None,
        images_key: str = "images",
        image_folder: str | None = None,
        chat: bool = False,
        eval_batch_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(eval_batch_size=eval_batch_size, shuffle=shuffle, seed=seed)
        self.data_source = data_source
        self.images_key, self.image_folder = images_key, image_folder
        self.chat = chat
        self.paths = {"train": train, "val": val, "predict": predict}
        self.limits = {"train": max_train, "val": max_val, "predict": None}
        for name, limit in self.limits.items():
            if limit is not None and limit < 1:
                raise ConfigError(f"data.max_{name}={limit} must be at least 1; leave it out to use all rows")
        self._checked: set[str] = set()
        self._pictures = ImageCache()
        self.max_tokens: dict[str, int] = {}
        """Tokens of the longest "prompt" and of the longest "sequence" (with an answer of the data) among the rows that were looked at."""

    def read(self) -> None:
        """Read all splits and look at each row; the constructor of a subclass ends with it."""
        for split, paths in self.paths.items():
            key = f"data.{split}"
            if paths:
                files = find_files(paths, split=split, key=key)
            elif split == "val" and isinstance(self.paths["train"], str):
                files = self._beside(self.paths["train"])
            else:
                continue
            if files:
                setattr(self, SPLITS[split], read_rows(files, self._row, limit=self.limits[split], key=key, depends=self._options()))

    def _beside(self, train: str) -> list[Path]:
        folder = Path(train).expanduser()
        return split_files(sorted(folder.iterdir())).get("val", []) if folder.is_dir() else []

    def _row(self, fields: Fields, file: TextFile, number: int) -> Fields:
        known = {"id": f"{file.stem}-{number}", "data_source": self.data_source or file.stem}
        row = known | self.fields(fields)
        folder = file.path.parent if self.image_folder is None else Path(self.image_folder).expanduser()
        return with_images(row, given=fields.get(self.images_key), key=self.images_key, folder=folder)

    # ------------------------------------------------------------------ what a format says
    @abstractmethod
    def fields(self, row: Fields) -> Fields:
        """A row's fields under the names that methods and rewards know, `prompt` among them. Raises InvalidRow."""

    @abstractmethod
    def unusable(self, info: Info) -> str | None:
        """The reason why a row is left out, equal ones counted together. Raises InvalidRow for what stops the run."""

    # ------------------------------------------------------------------ with the tokenizer
    @property
    def policy(self) -> CausalLM:
        """The language model; its tokenizer is there before its weights are."""
        policy = getattr(module := self._trainer().lightning_module, "policy", None)
        if policy is None:
            raise ConfigError(f"data: {type(self).__name__} needs the tokenizer of model.policy, which {type(module).__name__} lacks")
        return policy

    def setup(self, stage: str) -> None:
        """Look at every row of the stage's splits with the policy's tokenizer, once."""
        for split in STAGES[stage]:
            if split not in self._checked:
                self._checked.add(split)
                rows = getattr(self, SPLITS[split])
                if rows:
                    self.use(split, self._usable(rows, key=f"data.{split}"))

    def note(self, kind: Literal["prompt", "sequence"], tokens: int) -> None:
        """Remember the longest."""
        self.max_tokens[kind] = max(tokens, self.max_tokens.get(kind, 0))

    def use(self, split: str, rows: Rows) -> None:
        """Take the rows of a split that were checked."""
        setattr(self, SPLITS[split], rows)

    def _usable(self, rows: Rows, *, key: str) -> Rows:
        found = recall(name := self._name(rows))
        kept_everywhere = all(gather_objects(found is not None))
        if found is None or not kept_everywhere:
            found = self._look(rows, key=key)
            keep(name, found, rows=len(rows))
        for kind, tokens in found.max_tokens.items():
            self.max_tokens[kind] = max(tokens, self.max_tokens.get(kind, 0))
        for reason, left_out in found.left_out.items():
            rank_zero_info(f"{key}: {len(left_out)} of {len(rows)} rows left out: {reason}")
        kept = np.delete(np.arange(len(rows)), sorted(i for left_out in found.left_out.values() for i in left_out))
        if not len(kept):
            raise ConfigError(f"{key}: all {len(rows)} rows are left out: {', '.join(found.left_out)}")
        return rows.select(kept.tolist()) if found.left_out else rows

    def _look(self, rows: Rows, *, key: str) -> Verdict:
        """Look at each row, every process at a share of them. Raises one ConfigError for what stops the run, the same on all."""
        rank, world = place()
        found, problems = self._judge(rows, range(len(rows) * rank // world, len(rows) * (rank + 1) // world))
        everywhere = gather_objects((found, problems))
        complain([problem for _, theirs in everywhere for problem in theirs], key=key)
        whole = Verdict()
        for theirs, _ in everywhere:
            whole.add(theirs)
        return whole

    def _judge(self, rows: Rows, share: range) -> tuple[Verdict, list[str]]:
        """Findings about a share of the rows, and sentences about those that stop the run."""
        found, problems = Verdict(), list[str]()
        before, self.max_tokens = self.max_tokens, found.max_tokens
        sees = bool(getattr(self.policy, "banned_ids", ()))  # tokens that stand for pictures
        numbered = zip(share, rows[share.start : share.stop])
        while some := list(islice(numbered, TOGETHER)):
            self.ahead([info for _, info in some])
            for i, info in some:
                try:
                    if sees:
                        check_places(info, key=self.images_key)
                    if reason := self.unusable(info):
                        found.left_out.setdefault(reason, []).append(i)
                except ConfigError as error:
                    problems.append(f"{rows.place(i)}: {error}")
        self.ahead([])
        self.max_tokens = before
        return found, problems

    def ahead(self, rows: Sequence[Info]) -> None:
        """Prepare for `unusable` of these rows, one after the other: what is faster for many is done here."""

    def _options(self) -> str | None:
        """All that a look at a row depends on beside the row itself; None in a class of somebody's own, whose code may be anywhere."""
        if not type(self).__module__.startswith("datamodules."):
            return None
        own = vars(self).keys() - vars(PromptDataModule()).keys() - STATE
        return repr((type(self).__qualname__, sorted((name, getattr(self, name)) for name in own if not name.startswith("_"))))

    def _name(self, rows: Rows) -> str | None:
        """The name of what is found with the policy's tokenizer."""
        policy, options = self.policy, self._options()
        if rows.name is None or options is None or type(policy) is not CausalLM or not type(policy).__module__.startswith("lit_rl."):
            return None
        if len(rows) < WORTH or (tokenizer := fingerprint(policy.tokenizer)) is None:
            return None
        return named(["tokens", rows.name, options, type(policy).__qualname__, tokenizer, policy.chat_template_kwargs, policy.stop_ids])

    def prompt_ids(self, info: Info) -> list[int]:
        """Token ids of a prompt, ready for an answer."""
        return self.with_pictures(self.encoded(info), info)

    def encoded(self, info: Info) -> list[int]:
        """Token ids of a prompt, with one place for each of its images."""
        return self.policy.encode(info["prompt"], **template_of(info))

    def with_pictures(self, ids: list[int], info: Info) -> list[int]:
        """A prompt's ids with the places of its images, see `TokenPolicy.with_pictures`."""
        return self.policy.with_pictures(ids, [False] * len(ids), sizes_of(info))[0]

    def media(self, info: Info) -> Sequence[Tensor]:
        """Images of a row as the policy reads them, uint8 "3 H W"; those last asked for are held in memory."""
        places = [f"{info['id']}: {self.images_key}[{i}]" for i in range(len(info.get("images", ())))]
        return [self._pictures.read(partial(self._picture, *one)) for one in zip(info.get("images", ()), places)]

    def _picture(self, source: Source, where: str) -> Tensor:
        return self.policy.media([read_picture(source, None, None, None, where=where)])[0]
