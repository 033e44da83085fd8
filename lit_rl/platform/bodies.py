"""Bodies of requests. Unknown keys and wrong types are refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, StringConstraints

Line = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One line of text."""

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One line of text, something of which can be seen."""

PathText = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
Text = Annotated[str, StringConstraints(max_length=20_000, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1, le=1 << 40)]
Tags = Annotated[list[Line], Field(max_length=32)]
DEPTH = 32
"""Levels of lists and objects in a value."""


def bounded(value: JsonValue, depth: int = DEPTH) -> JsonValue:
    """A value that can be answered again: no whole number beyond 64 bits, at most `depth` levels. Raises ValueError."""
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("a whole number has more than 64 bits")
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    if inner and not depth:
        raise ValueError(f"lists and objects are more than {DEPTH} levels deep")
    for one in inner:
        bounded(one, depth - 1)
    return value


Value = Annotated[JsonValue, AfterValidator(bounded)]


class Body(BaseModel):
    """A JSON object of exactly these keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class NewJob(Body):
    """A run to be made.

    template: a run file below `configs/`; by default that of the algorithm. What a field leaves open is as in the template.
    overrides: further keys of the run's YAML, e.g. {"model.init_args.group_size": 8}; class paths in it are of this project.
    """

    name: Name
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
    overrides: dict[Line, Value] = {}


class ChangedJob(Body):
    """Fields of a job that may be changed at any time."""

    name: Name | None = None
    description: Text | None = None
    notes: Text | None = None
    tags: Tags | None = None


class Stop(Body):
    """Says how a job stops: with a checkpoint, and by force after `grace_s` seconds, or at once."""

    mode: Literal["graceful", "now"] = "graceful"
    grace_s: Annotated[float, Field(ge=0, le=86400)] = 300.0


class Resume(Body):
    """Names the checkpoint from which a job continues: `last`, `best`, or the id of one of its list."""

    checkpoint: Line | int = "last"


Number = float | None | Literal["NaN", "Infinity", "-Infinity"]
"""A metric's value. JSON has no number that is not finite: null, or its name, stands for one."""

Key = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
StepNumber = Annotated[int, Field(ge=0, le=1 << 53)]
Moment = Annotated[float, Field(ge=0, le=1e11)] | None


class NewPoint(Body):
    """Metrics of a step. ts: seconds since 1970."""

    step: StepNumber
    metrics: Annotated[dict[Key, Number], Field(max_length=512)]
    epoch: StepNumber | None = None
    ts: Moment = None

    def numbers(self) -> dict[str, float | None]:
        """The metrics; what is not finite is None."""
        return {key: None if isinstance(value, str) else value for key, value in self.metrics.items()}


class NewPoints(Body):
    """Metrics of up to 1,000 steps."""

    points: Annotated[list[NewPoint], Field(min_length=1, max_length=1000)]


class NewGpuSample(Body):
    """A GPU at a moment: utilization in percent, memory in GB, temperature in degrees Celsius, power in watts."""

    gpu_index: Annotated[int, Field(ge=0, le=4096)]
    utilization: float | None = None
    memory_used: float | None = None
    memory_total: float | None = None
    temperature: float | None = None
    power_w: float | None = None
    ts: Moment = None


class NewGpuSamples(Body):
    """Figures of GPUs."""

    samples: Annotated[list[NewGpuSample], Field(min_length=1, max_length=1000)]


class NewCheckpoint(Body):
    """A checkpoint that a run has written, and what its evaluation gave."""

    step: StepNumber
    path: PathText
    eval_results: dict[Key, Value] | None = None


class NewStatus(Body):
    """A state that a run reports: running, succeeded, failed, stopped, or a word of its own. max_steps: the step of its last report."""

    status: Annotated[Line, StringConstraints(min_length=1)]
    message: Text = ""
    max_steps: StepNumber | None = None


class NewSample(Body):
    """A sample of a step. images: names of the parts that hold its pictures, several for a film strip. reward: by default their mean."""

    step: StepNumber
    prompt: Text
    text: Text | None = None
    group: Line | int | None = None
    source: Line | None = None
    rewards: Annotated[dict[Key, float | None], Field(max_length=64)] = {}
    reward: float | None = None
    advantage: float | None = None
    images: Annotated[list[Key], Field(max_length=64)] = []


class NewSamples(Body):
    """Samples of a job."""

    items: Annotated[list[NewSample], Field(min_length=1, max_length=256)]


class Login(Body):
    """The token of the server, for a browser."""

    token: Line
