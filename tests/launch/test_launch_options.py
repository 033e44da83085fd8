"""The place of a node: option before environment before SLURM before default, and a sentence for what does not fit."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from lit_rl.launch.__main__ import main
from lit_rl.launch.options import Nodes, divided, nodes, parser

RUN = ["fit", "--config", "configs/base/cpu.yaml"]
GUIDE = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29701", "NGPUS": "8"}
SLURM = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_JOB_ID": "123456"}


def found(*words: str, run: list[str] = RUN, environment: Mapping[str, str] = {}) -> Nodes:
    return nodes(parser().parse_args(list(words)), run, {"CUDA_VISIBLE_DEVICES": "", **environment})


def test_a_single_node_needs_no_option() -> None:
    assert found() == Nodes(least=1, most=1, rank=0, address=None, port=29700, processes=1)


def test_the_variables_of_the_guide_and_options_before_them() -> None:
    assert found(environment=GUIDE) == Nodes(4, 4, 3, "10.0.0.1", 29701, 8)
    words = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "b", "--master-port", "5", "--nproc-per-node", "2")
    assert found(*words, environment=GUIDE) == Nodes(2, 2, 1, "b", 5, 2)


@pytest.mark.parametrize("listed", ["10.0.0.1:8,10.0.0.2:8,10.0.0.3:8", "10.0.0.1\n10.0.0.2\n10.0.0.3\n", "a b c"])
def test_nodes_are_counted_in_a_list_of_addresses(listed: str) -> None:
    environment = {"NODE_IP_LIST": listed, "INDEX": "2", "CHIEF_IP": "10.0.0.1"}
    assert found(environment=environment) == Nodes(3, 3, 2, "10.0.0.1", 29700, 1)
    assert found(environment=environment | {"NNODES": "4"}).most == 4


def test_an_empty_variable_is_none() -> None:
    assert found(environment={"NODE_IP_LIST": "", "NNODES": " ", "NODE_RANK": "", "NGPUS": ""}).most == 1


def test_slurm_names_the_first_node_as_lightning_does() -> None:
    assert found(environment=SLURM) == Nodes(3, 3, 2, "gpu07", 15000 + 3456, 1)
    assert found("--master-port", "1", environment=SLURM | {"MASTER_ADDR": "x"}) == Nodes(3, 3, 2, "x", 1, 1)


def test_processes_are_those_of_the_run_or_one_for_each_gpu() -> None:
    assert found(run=[*RUN, "--trainer.devices", "3"]).processes == 3
    assert found(run=[*RUN, "--trainer.devices=3"], environment={"NGPUS": "2"}).processes == 2
    assert found(run=[*RUN, "--trainer.devices", "auto"], environment={"CUDA_VISIBLE_DEVICES": "4,5,6"}).processes == 3


def test_a_range_of_nodes() -> None:
    several = found("--nnodes", "2:4", environment=GUIDE)
    assert (several.least, several.most) == (2, 4)


def mistake(capsys: pytest.CaptureFixture[str], *words: str, run: list[str] = RUN) -> str:
    assert main([*words, "--dry-run", "--", *run]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--nnodes", "0"), "--nnodes is '0'; it is a whole number of at least 1"),
        (("--nnodes", "four"), "--nnodes is 'four'"),
        (("--nnodes", "4:2"), "--nnodes is 4:2; MIN:MAX begins with the smaller number, 2:4"),
        (("--nnodes", "2"), "give --master-addr or set MASTER_ADDR"),
        (("--nnodes", "2", "--node-rank", "2", "--master-addr", "a"), "--node-rank is 2, and the run has 2 nodes, 0 to 1"),
        (("--nnodes", "2", "--master-addr", "a:1"), "a name or an IP address without port, which is --master-port"),
        (("--master-port", "70000"), "--master-port is '70000'; it is a whole number from 1 to 65535"),
        (("--nproc-per-node", "-1"), "--nproc-per-node is '-1'"),
        (("--restarts", "x"), "--restarts is 'x'"),
        (("--grace", "0"), "--grace is '0'"),
        (("--node", "2"), "unrecognized arguments: --node 2"),
    ],
)
def test_a_wrong_option_is_one_sentence(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str) -> None:
    assert sentence in mistake(capsys, *words)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "5"}, "NODE_RANK is 5"),
        ({"NGPUS": "all"}, "NGPUS is 'all'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (SLURM | {"SLURM_NTASKS_PER_NODE": "8"}, "#SBATCH --ntasks-per-node=1"),
    ],
)
def test_a_wrong_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sentence in mistake(capsys)


def test_words_of_the_run_stand_behind_two_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert divided(["--nnodes", "2", "--", *RUN]) == (["--nnodes", "2"], RUN)
    assert main(RUN) == 2 and "the words of the run stand behind `--`" in capsys.readouterr().err
    assert "behind `--` stands one of fit" in mistake(capsys, run=["cli.py", *RUN])
    assert "there is no such file" in mistake(capsys, run=["fit", "--config", "no.yaml"])


def test_a_restart_does_not_begin_at_an_old_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--restarts 2 begins each time at the newest checkpoint" in mistake(
        capsys, "--restarts", "2", run=[*RUN, "--ckpt_path", "a.ckpt"]
    )


def dry(capsys: pytest.CaptureFixture[str], *words: str, run: list[str] = RUN) -> list[str]:
    assert main([*words, "--dry-run", "--", *run]) == 0
    return shlex.split(capsys.readouterr().out)


def test_the_line_that_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Torchrun itself understands it; a fit continues at its newest checkpoint."""
    from torch.distributed.run import parse_args

    words = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--nproc-per-node", "8", "--restarts", "3", "--grace", "60")
    line = dry(capsys, *words)
    assert line[0] == "torchrun"
    args = parse_args(line[1:])
    assert (args.nnodes, args.nproc_per_node, args.rdzv_endpoint, args.max_restarts, args.shutdown_timeout) == (
        "2",
        "8",
        "127.0.0.1:29700",
        3,
        60,
    )
    assert (args.local_addr, args.rdzv_conf) == ("127.0.0.1", "is_host=false,join_timeout=600")
    assert Path(args.training_script).name == "cli.py" and args.training_script_args == [*RUN, "--ckpt_path", "last"]


@pytest.mark.parametrize("run", [["validate", *RUN[1:]], [*RUN, "--ckpt_path", "a.ckpt"], [*RUN, "--ckpt_path=last"]])
def test_nothing_is_added_to_other_runs(capsys: pytest.CaptureFixture[str], run: list[str]) -> None:
    assert dry(capsys, run=run)[-len(run) :] == run


def test_a_port_that_is_taken_is_told_before_anything_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port, "--", *RUN]) == 2
    assert f"cannot listen on 0.0.0.0:{port}" in (said := capsys.readouterr().err) and "--master-port" in said
