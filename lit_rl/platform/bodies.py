"""Bodies of requests. Unknown keys and wrong types are refused by name."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

Line = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One line of text."""

PathText = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
Text = Annotated[str, StringConstraints(max_length=20_000, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1, le=1 << 40)]
Tags = Annotated[list[Line], Field(max_length=32)]


class Body(BaseModel):
    """A JSON object of exactly these keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class NewJob(Body):
    """A run to be made.

    template: a run file below `configs/`; by default that of the algorithm. What a field leaves open is as in the template.
    overrides: further keys of the run's YAML, e.g. {"model.init_args.group_size": 8}; class paths in it are of this project.
    """

    name: Annotated[Line, StringConstraints(min_length=1)]
    algorithm: Annotated[Line, StringConstraints(min_length=1)]
    description: Text = ""
    notes: Text = ""
    tags: Tags = []
    template: PathText | None = None
    model_path: PathText | None = None
    model_size: Line | None = None
    train_data_path: PathText | None = None
    eval_data_path: PathText | None = None
    num_gpus: Annotated[int, Field(ge=0, le=4096)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    batch_size: Count | None = None
    num_epochs: Count | None = None
    context_length: Count | None = None
    rollout_n: Count | None = None
    kl_coef: Annotated[float, Field(ge=0)] | None = None
    overrides: dict[Line, JsonValue] = {}


class ChangedJob(Body):
    """What may be changed of a job at any time."""

    name: Annotated[Line, StringConstraints(min_length=1)] | None = None
    description: Text | None = None
    notes: Text | None = None
    tags: Tags | None = None


class Login(Body):
    """The token of the server, for a browser."""

    token: Line
