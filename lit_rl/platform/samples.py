"""Samples of jobs: prompt, picture or answer, rewards and advantage. Pictures are drawn anew, so that nothing but pixels is served."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa

from lit_rl.platform.answers import invalid, not_found
from lit_rl.platform.bodies import NewSample
from lit_rl.platform.records import Records
from lit_rl.platform.schema import samples
from lit_rl.platform.store import Store

MAX_PIXELS = 4096 * 4096
Found = dict[str, object]
KEPT_STEPS, KEPT_OF_STEP = 200, 512
"""Steps of a job whose samples are kept, and samples of a step; of more steps the oldest are forgotten, of more samples the last."""


class Samples:
    """The samples of a store's jobs; their pictures lie in the folder `gallery` of each run."""

    def __init__(self, store: Store, records: Records) -> None:
        self.store, self.records = store, records

    def add(self, job: str, items: Sequence[NewSample], images: Mapping[str, bytes]) -> int:
        """Keep samples, and return how many are kept. images: by the name that items call them.

        Raises ApiError 422 for what is no picture, before anything is kept.
        """
        drawn = {name: redrawn(data) for name, data in images.items()}
        if missing := sorted({name for item in items for name in item.images} - drawn.keys()):
            raise invalid(f"images: no part {missing[0]!r} came with the samples")
        kept = 0
        with self.store.write() as connection:
            for step in sorted({item.step for item in items}):
                mine = sa.select(sa.func.count()).where(samples.c.job == job, samples.c.step == step)
                room = max(KEPT_OF_STEP - connection.execute(mine).scalar_one(), 0)
                for item in [item for item in items if item.step == step][:room]:
                    connection.execute(sa.insert(samples).values(self._row(job, item, drawn)))
                    kept += 1
        self._forget(job)
        return kept

    def listed(
        self, job: str, *, step: int | None, sort: str, source: str | None, group: str | None, limit: int
    ) -> list[dict[str, object]]:
        """Samples of a step, of the newest one where none is named."""
        newest = sa.select(sa.func.max(samples.c.step)).where(samples.c.job == job).scalar_subquery()
        query = sa.select(samples).where(samples.c.job == job, samples.c.step == (newest if step is None else step))
        query = query if source is None else query.where(samples.c.source == source)
        query = query if group is None else query.where(samples.c.group == group)
        column = {"reward": samples.c.reward, "advantage": samples.c.advantage, "id": samples.c.id}[sort.removeprefix("-")]
        query = query.order_by((column.desc() if sort.startswith("-") else column).nulls_last(), samples.c.id).limit(limit)
        with self.store.read() as connection:
            return [_shown(row) for row in connection.execute(query).mappings()]

    def steps(self, job: str) -> list[int]:
        """The steps that have samples."""
        query = sa.select(samples.c.step).where(samples.c.job == job).distinct().order_by(samples.c.step)
        with self.store.read() as connection:
            return list(connection.execute(query).scalars())

    def image(self, job: str, step: int, name: str) -> Path:
        """The file of a picture. Raises ApiError 404."""
        path = self._folder(job) / str(step) / name
        if not path.is_file():
            raise not_found("image", name)
        return path

    def _folder(self, job: str) -> Path:
        return self.records.folder(job) / "gallery"

    def _row(self, job: str, item: NewSample, drawn: Mapping[str, bytes]) -> dict[str, object]:
        folder = self._folder(job) / str(item.step)
        names = []
        for name in item.images:
            folder.mkdir(parents=True, exist_ok=True)
            number = sum(1 for _ in folder.iterdir())
            (folder / f"{number}.webp").write_bytes(drawn[name])
            names.append(f"{number}.webp")
        known = [value for value in item.rewards.values() if value is not None]
        reward = item.reward if item.reward is not None else math.fsum(value / len(known) for value in known) if known else None
        group = None if item.group is None else str(item.group)
        plain = item.model_dump(include={"step", "source", "prompt", "text", "rewards", "advantage"})
        return plain | {"job": job, "group": group, "reward": reward, "images": names}

    def _forget(self, job: str) -> None:
        for step in self.steps(job)[:-KEPT_STEPS]:
            with self.store.write() as connection:
                connection.execute(sa.delete(samples).where(samples.c.job == job, samples.c.step == step))
            shutil.rmtree(self._folder(job) / str(step), ignore_errors=True)


def redrawn(data: bytes) -> bytes:
    """A picture as WebP. Raises ApiError 422 for bombs, animations, and what is neither PNG, JPEG nor WebP."""
    from PIL import Image

    from lit_rl.rewards.service.images import decode_image
    from lit_rl.rewards.service.samples import SampleError

    try:
        pixels = decode_image(data, max_pixels=MAX_PIXELS)
    except SampleError as error:
        raise invalid(f"images: {error}") from error
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=90)
    return file.getvalue()


def _shown(row: sa.RowMapping) -> dict[str, object]:
    urls = [f"/api/jobs/{row['job']}/samples/{row['step']}/images/{name}" for name in row["images"]]
    kept = ("id", "step", "group", "source", "prompt", "text", "rewards", "reward", "advantage")
    kind = "film" if len(urls) > 1 else "image" if urls else "text"
    return {key: row[key] for key in kept} | {"image_url": urls[0] if urls else None, "image_urls": urls, "kind": kind}
