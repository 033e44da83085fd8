"""Writes the data sets of the guides as a run reads them, from files as they are published; downloads where there is a network.

python -m lit_rl.prepare gsm8k   --out data/gsm8k [--from FILE|FOLDER|owner/name]    -> train.parquet, test.parquet: prompts with a rule
python -m lit_rl.prepare geo3k   --out data/geo3k [--from ...]                       -> the same of Geometry3K, with a picture in each row
python -m lit_rl.prepare hh_rlhf --out data       [--from FILE|FOLDER|owner/name]    -> dpo_train.parquet, dpo_val.parquet: preferences
python -m lit_rl.prepare model   --out models/Qwen2.5-7B-Instruct --from Qwen/Qwen2.5-7B-Instruct [--hub modelscope]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datamodules.text_files import TextFile

Hub = Literal["huggingface", "modelscope"]

QUESTION = ' Let\'s think step by step and output the final answer after "####".'
BOXED = " Think step by step, and put the final answer in \\boxed{}."
ASSISTANT = "\n\nAssistant:"


def gsm8k_row(fields: dict[str, object], file: TextFile, number: int) -> dict[str, object]:
    """question and answer -> a prompt that asks for the number behind "####", and the number."""
    from datamodules.text_files import InvalidRow

    question, answer = (_text(fields, key, "; GSM8K's rows have question and answer") for key in ("question", "answer"))
    found = re.search(r"#### (-?[0-9.,]+)", answer)
    if found is None:
        raise InvalidRow(f'answer: expected "#### " and a number at its end, found {answer[-40:]!r}')
    return {
        "question": question,
        "answer": answer,
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": question + QUESTION}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": found.group(1).replace(",", "")},
    }


def geo3k_row(fields: dict[str, object], file: TextFile, number: int) -> dict[str, object]:
    """images, problem and answer -> a prompt with `<image>` where each picture stands, and the answer that a box must hold."""
    from datamodules.text_files import InvalidRow

    problem, answer = (_text(fields, key, "; Geometry3K's rows have images, problem and answer") for key in ("problem", "answer"))
    if not isinstance(images := fields.get("images"), list) or not images:
        raise InvalidRow("images: expected a list of pictures; Geometry3K's rows have images, problem and answer")
    return {
        "images": images,
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": problem + BOXED}],
        "ability": "math",
        "reward_model": {
            "style": "rule",
            "ground_truth": re.sub(r"\s*([{}])\s*", r"\1", answer),
        },  # "\\sqrt { 2 }" is a spelling of its own
    }


def hh_rlhf_row(fields: dict[str, object], file: TextFile, number: int) -> dict[str, object]:
    """prompt, chosen, rejected; of Anthropic's own files, which hold two whole dialogues, the last answers and what is before them."""
    from datamodules.text_files import InvalidRow

    whole = fields.get("chosen"), fields.get("rejected")
    if "prompt" not in fields and isinstance(whole[0], str) and isinstance(whole[1], str):
        before, mark, chosen = whole[0].rpartition(ASSISTANT)
        other, _, rejected = whole[1].rpartition(ASSISTANT)
        if before != other or not mark:
            raise InvalidRow(f"chosen and rejected: expected the same dialogue up to the last {ASSISTANT.strip()!r}, or a field prompt")
        fields = {"prompt": before + mark, "chosen": chosen, "rejected": rejected}
    return {key: _text(fields, key) for key in ("prompt", "chosen", "rejected")}


def _text(fields: dict[str, object], key: str, why: str = "") -> str:
    from datamodules.text_files import InvalidRow

    if not isinstance(text := fields.get(key), str):
        raise InvalidRow(f"{key}: expected a text, found {type(text).__name__}{why}")
    return text


@dataclass(frozen=True)
class Source:
    """A data set: where it is published, what becomes of a row, and the file of each split."""

    repository: str
    row: Callable[[dict[str, object], TextFile, int], dict[str, object]]
    files: dict[str, str]


SOURCES = {
    "gsm8k": Source("openai/gsm8k", gsm8k_row, {"train": "train.parquet", "val": "test.parquet"}),
    "geo3k": Source("hiyouga/geometry3k", geo3k_row, {"train": "train.parquet", "val": "test.parquet"}),
    "hh_rlhf": Source("Dahoas/full-hh-rlhf", hh_rlhf_row, {"train": "dpo_train.parquet", "val": "dpo_val.parquet"}),
}
INSIDE = (".", "main", "data")
"""Folders of a repository that hold its files; `main` is GSM8K's usual one of two."""


def prepare(name: str, *, source: str | None, out: Path, hub: Hub = "huggingface") -> dict[Path, int]:
    """Write the splits of a data set; rows by file. source: files as they are published, or the repository; None: the usual one."""
    from datamodules.text_files import read_rows

    known = SOURCES[name]
    given = Path(source).expanduser() if source else None
    if given is None or (not given.exists() and is_repository(source)):
        given = download(source or known.repository, kind="dataset", hub=hub)
    written: dict[Path, int] = {}
    for split, files in found_files(given).items():
        rows = read_rows(files, known.row, key="--from")
        out.mkdir(parents=True, exist_ok=True)
        write_parquet([dict(row) for row in rows], out / known.files[split])
        written[out / known.files[split]] = len(rows)
    return written


def found_files(given: Path) -> dict[str, list[Path]]:
    """Files by split; one whose name tells none is for training."""
    from datamodules.text_paths import SUFFIXES, find_files, split_files
    from lit_rl.errors import ConfigError

    if not given.is_dir():
        files = find_files(str(given), split="", key="--from")
    else:
        folders = [given / inside for inside in INSIDE if (given / inside).is_dir()]
        files = next((f for folder in folders if (f := sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES))), [])
        if not files:
            raise ConfigError(f"--from: {given} holds no {', '.join(SUFFIXES)} file (unpack those that end in .gz)")
    return split_files(files) or {"train": files}


def write_parquet(rows: Sequence[dict[str, object]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from lit_rl.checkpoints.replacing import atomic_file

    with atomic_file(path) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


# ---------------------------------------------------------------------- downloads


def is_repository(name: str | None) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name or "") is not None and not str(name).startswith(".")


def download(repository: str, *, kind: Literal["dataset", "model"], hub: Hub, out: Path | None = None) -> Path:
    """A repository's folder on this machine. Raises ConfigError that says what to do where it cannot be downloaded."""
    from lit_rl.errors import ConfigError

    try:
        if hub == "modelscope":
            return modelscope_folder(repository, kind=kind, out=out)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, repo_type=kind, local_dir=out))
    except OSError as error:  # no network, no such repository, no permission
        option = "--repo-type dataset " if kind == "dataset" else ""
        by_hand = {
            "huggingface": f"hf download {repository} {option}--local-dir FOLDER",
            "modelscope": f"modelscope download --{kind} {repository} --local_dir FOLDER",
        }[hub]
        use = "give --from FOLDER" if kind == "dataset" else "set model.policy.pretrained to the folder"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{repository} is not on this machine and cannot be downloaded from {hub} ({reason}): where there is a network run "
            f"`{by_hand}`, copy the folder here and {use}"
        ) from error


def modelscope_folder(repository: str, *, kind: Literal["dataset", "model"], out: Path | None) -> Path:
    from lit_rl.errors import ConfigError

    try:
        import modelscope
    except ImportError as error:
        raise ConfigError("--hub modelscope needs its package: pip install modelscope") from error
    fetch = modelscope.snapshot_download if kind == "model" else modelscope.dataset_snapshot_download
    return Path(fetch(repository, local_dir=None if out is None else str(out)))


# ---------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lit_rl.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*SOURCES, "model"])
    parser.add_argument("--from", dest="source", help="file, folder or repository; default for data sets: the repository of that name")
    parser.add_argument("--out", required=True, type=Path, help="folder, made if it is not there")
    parser.add_argument("--hub", choices=["huggingface", "modelscope"], default="huggingface", help="where downloads come from")
    args = parser.parse_args(argv)
    if args.what == "model" and not is_repository(args.source):
        parser.error("model: --from names a repository, e.g. --from Qwen/Qwen2.5-7B-Instruct")

    from lit_rl.errors import ConfigError

    try:
        if args.what == "model":
            print(f"{download(args.source, kind='model', hub=args.hub, out=args.out.expanduser())}")
            return
        for path, count in prepare(args.what, source=args.source, out=args.out.expanduser(), hub=args.hub).items():
            print(f"{path}: {count} rows")
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
