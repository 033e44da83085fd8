"""Makes the command of a job from its fields: the YAML that is laid over the template, and the reasons why the job could not start."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lit_rl.command_line.early import early_mistake, parameters, source_of
from lit_rl.platform.places import place_of, there
from lit_rl.platform.processes import OVERLAY
from lit_rl.platform.rows import count_rows
from lit_rl.platform.templates import Tree, at, find, laid_over, put, read

POLICY, MODEL, DATA = "model.init_args.policy.init_args", "model.init_args", "data.init_args"
KEYS = ("model", "data", "trainer", "run", "seed_everything", "images", "texts")
"""First parts of the keys that `overrides` may set."""

OURS = ("lit_rl.", "callbacks.", "datamodules.", "torch.optim.")
"""Beginnings of class paths that `overrides` may name."""

GROUPS = ("grpo", "dapo", "gspo", "flow_grpo", "diffusion_nft", "deepgen")
"""Algorithms that compare the samples of a prompt with each other."""

BYTES_PER_WEIGHT, BYTES_PER_FROZEN = 18.0, 3.0
"""Bytes of a weight in bfloat16, if it is trained of its gradient, float32 copy and moments, and room for activations."""

GPU_BYTES = 80e9
Problem = dict[str, str]


@dataclass
class Plan:
    """A job's run. overrides: what `job.yaml` holds. config: the whole run. problems: why it cannot start, each with its field."""

    template: Path | None = None
    overrides: Tree = field(default_factory=dict)
    config: Tree = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, field: str, sentence: str) -> None:
        """Note a reason against the start."""
        self.problems.append({"field": field, "problem": sentence})

    def set(self, key: str, value: object) -> None:
        """Set a key of the run."""
        put(self.overrides, key, value)

    @property
    def yaml(self) -> str:
        """The text of `job.yaml`."""
        return yaml.safe_dump(self.overrides, sort_keys=False, allow_unicode=True)

    def argv(self, folder: Path, root: Path, checkpoint: str | None) -> list[str]:
        """The command; no words without a template. What a user wrote is in the YAML and never a word of it."""
        if self.template is None:
            return []
        more = ["--ckpt_path", checkpoint] if checkpoint else []
        return [sys.executable, str(root / "cli.py"), "fit", "--config", str(self.template), "--config", str(folder / OVERLAY), *more]


def planned(fields: Mapping[str, object], folder: Path, *, root: Path, gpus: int, checkpoint: str | None = None) -> Plan:
    """The run of a job. gpus: how many this machine has. Problems are listed, none is raised."""
    plan = Plan()
    try:
        template, given = fields["template"], fields["algorithm"]
        plan.template = find(root, str(given).lower().replace("-", "_"), None if template is None else str(template))
    except ValueError as error:
        plan.problem("template" if str(error).startswith("template") else "algorithm", str(error))
        return plan
    base = read(plan.template)
    plan.set("run", {"dir": str(folder.parent), "name": folder.name, "callbacks": {"progress": {"line": "step"}}})
    _models(plan, fields, base, root)
    _places(plan, fields, base, gpus, root)
    _sizes(plan, fields, base)
    _files(plan, fields, base, root)
    _overrides(plan, fields.get("overrides") or {})
    plan.config = laid_over(base, plan.overrides)
    if checkpoint is not None and not there(Path(checkpoint)):
        plan.problem("checkpoint", f"{checkpoint} does not exist any more")
    return plan


def check_keys(plan: Plan, folder: Path, root: Path) -> None:
    """Note the first key of the written `job.yaml` that its class does not have, as the command line would say it."""
    if mistake := early_mistake(["cli.py", *plan.argv(folder, root, None)[2:]]):
        plan.problem("overrides", mistake.replace(f"{folder}/", ""))


def _models(plan: Plan, fields: Mapping[str, object], base: Tree, root: Path) -> None:
    path = fields.get("model_path")
    if path is not None:
        plan.set(f"{POLICY}.pretrained", path)
    path = path or at(base, f"{POLICY}.pretrained")
    if isinstance(path, str) and re.match(r"[/~.]|outputs/", path) and not there(place_of(root, path)):
        plan.problem("model_path", f"{path} does not exist on this machine")
    rate, kl = fields.get("learning_rate"), fields.get("kl_coef")
    if rate is not None:
        plan.set(f"{MODEL}.optimizer.init_args.lr", rate)
        if at(base, f"{MODEL}.lr_scheduler.init_args.max_lr") is not None:
            plan.set(f"{MODEL}.lr_scheduler.init_args.max_lr", rate)
    if kl is not None and _has(base, "kl", plan, "kl_coef"):
        plan.set(f"{MODEL}.kl.coef", kl)
        if kl and isinstance(at(base, POLICY), dict) and at(base, f"{POLICY}.lora") is None:
            plan.set(f"{POLICY}.keep_reference", True)


def _places(plan: Plan, fields: Mapping[str, object], base: Tree, gpus: int, root: Path) -> None:
    """Devices and strategy, and a LoRA where the model's whole training does not fit."""
    wanted = fields.get("num_gpus")
    wanted = wanted if isinstance(wanted, int) else min(gpus, 1)
    if wanted > gpus:
        plan.problem("num_gpus", f"{wanted} GPUs are asked for, this machine has {gpus}")
    whole = weights(str(fields.get("model_size") or ""), str(fields.get("model_path") or at(base, f"{POLICY}.pretrained") or ""))
    fits = whole * BYTES_PER_WEIGHT <= GPU_BYTES * max(wanted, 1)
    lora = at(base, f"{POLICY}.lora") is not None or at(fields.get("overrides"), f"{POLICY}.lora") is not None
    if wanted and not fits and not lora and "causal_lm" in str(at(base, "model.init_args.policy.class_path")):
        plan.overrides = laid_over(plan.overrides, read(root / "configs/base/lora.yaml"))
        lora = True
    small = whole * (BYTES_PER_FROZEN if lora else BYTES_PER_WEIGHT) <= GPU_BYTES
    name = "cpu" if not wanted else "one_gpu" if wanted == 1 else "ddp" if small else "fsdp"
    plan.overrides = laid_over(plan.overrides, read(root / f"configs/base/{name}.yaml"))
    plan.set("trainer.devices", max(wanted, 1))
    if not wanted:
        plan.set("trainer.precision", "32-true")


def weights(size: str, path: str) -> float:
    """Weights of a model by its label, such as 7B or 0.5B, else by its name; 0 where neither tells."""
    for text in (size, path):
        if found := re.search(r"(?<![\d.A-Za-z])(\d+(?:\.\d+)?)\s*([bBmM])(?![A-Za-z])", text):
            return float(found[1]) * (1e9 if found[2] in "bB" else 1e6)
    return 0.0


def _sizes(plan: Plan, fields: Mapping[str, object], base: Tree) -> None:
    """Prompts and samples of an iteration, and the lengths of texts."""
    batch, samples, context = fields.get("batch_size"), fields.get("rollout_n"), fields.get("context_length")
    before, update = at(base, f"{MODEL}.prompts_per_iteration"), at(base, f"{MODEL}.prompts_per_update")
    if isinstance(batch, int):
        plan.set(f"{MODEL}.prompts_per_iteration", batch)
        if isinstance(update, int) and batch % update:
            plan.set(f"{MODEL}.prompts_per_update", batch)
    if isinstance(samples, int) and _has(base, "group_size", plan, "rollout_n"):
        plan.set(f"{MODEL}.group_size", samples)
        if samples < 2 and fields["algorithm"] in GROUPS:
            plan.problem("rollout_n", f"{fields['algorithm']} compares the samples of a prompt: it needs at least 2 of them")
    _accumulate(plan, base, before if isinstance(before, int) else 1, update)
    if not isinstance(context, int):
        return
    prompt = at(base, f"{DATA}.max_prompt_length")
    if isinstance(prompt, int) and at(base, f"{MODEL}.answers") is not None:
        if context <= prompt:
            plan.problem("context_length", f"{context} leaves no room for answers: prompts alone have up to {prompt} tokens")
        plan.set(f"{MODEL}.answers.sampling.max_new_tokens", max(context - prompt, 1))
        if at(base, f"{MODEL}.answers.eval_sampling") is not None:
            plan.set(f"{MODEL}.answers.eval_sampling.max_new_tokens", max(context - prompt, 1))
    elif at(base, f"{DATA}.max_length") is not None:
        plan.set(f"{DATA}.max_length", context)
    else:
        plan.problem("context_length", "this run has no texts whose length it could limit")


def _accumulate(plan: Plan, base: Tree, before: int, update: object) -> None:
    """Keep the number of rows in a micro-batch that the template has, which is for 8 GPUs."""
    micro = at(base, "trainer.accumulate_grad_batches")
    if not isinstance(micro, int):
        return
    old = (update if isinstance(update, int) else before) * _number(at(base, f"{MODEL}.group_size"))
    config = laid_over(base, plan.overrides)
    now = _number(at(config, f"{MODEL}.prompts_per_update") or at(config, f"{MODEL}.prompts_per_iteration"))
    rows = now * _number(at(config, f"{MODEL}.group_size")) / _number(at(config, "trainer.devices"))
    plan.set("trainer.accumulate_grad_batches", max(1, round(rows * micro * 8 / old)))


def _number(value: object) -> int:
    return value if isinstance(value, int) else 1


def _files(plan: Plan, fields: Mapping[str, object], base: Tree, root: Path) -> None:
    """The data, and the number of iterations that go over them so many times."""
    for name, key in (("train_data_path", "train"), ("eval_data_path", "val")):
        path = fields.get(name)
        if path is not None and _has(base, key, plan, name, of="data"):
            plan.set(f"{DATA}.{key}", path)
        path = path or at(base, f"{DATA}.{key}")
        if isinstance(path, str) and not there(place_of(root, path)):
            plan.problem(name, f"{path} does not exist on this machine")
        elif isinstance(path, str) and name == "train_data_path" and isinstance(fields.get("num_epochs"), int):
            _passes(plan, _number(fields["num_epochs"]), place_of(root, path), base)


def _passes(plan: Plan, passes: int, path: Path, base: Tree) -> None:
    rows = count_rows(path)
    batch = _number(at(laid_over(base, plan.overrides), f"{MODEL}.prompts_per_iteration"))
    if rows is None:
        plan.problem("num_epochs", f"the rows of {path} cannot be counted: set trainer.max_epochs, the number of iterations, in overrides")
    elif rows < batch:
        plan.problem("batch_size", f"{batch} prompts for an iteration are more than the {rows} rows of {path}")
    else:
        plan.set("trainer.max_epochs", passes * (rows // batch))


def _has(base: Tree, option: str, plan: Plan, name: str, *, of: str = "model") -> bool:
    """True if the method or the datamodule takes an option; else it is a problem of the field `name`."""
    class_path = str(at(base, f"{of}.class_path"))
    source = source_of(class_path)
    known = parameters(source) if source else None
    if known is None or option in known:
        return True
    plan.problem(name, f"{class_path.rpartition('.')[2]} has no such setting: leave it out")
    return False


def _overrides(plan: Plan, given: object) -> None:
    assert isinstance(given, dict)
    for key, value in given.items():
        if key.split(".")[0] not in KEYS or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key) or _of_ours(key):
            plan.problem("overrides", f"{key!r} is no key that a job may set; they begin with {', '.join(KEYS)}, e.g. trainer.max_epochs")
            continue
        for path in foreign(key, value):
            plan.problem("overrides", f"{key}: the class {path[:200]!r} is not of this project")
        plan.set(key, value)


def _of_ours(key: str) -> bool:
    """True for the keys that say where a run writes, and for what holds them."""
    return key == "run" or key.split(".")[:2] in (["run", "dir"], ["run", "name"])


def foreign(key: str, value: object) -> Iterator[str]:
    """Class paths below a key that are not of this project."""
    if key.rpartition(".")[2] == "class_path" and not (isinstance(value, str) and value.startswith(OURS)):
        yield str(value)
    elif isinstance(value, dict):
        for below, inner in value.items():
            yield from foreign(str(below), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from foreign("", inner)
