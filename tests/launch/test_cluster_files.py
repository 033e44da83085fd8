"""configs/cluster and the pages about many machines: what schedulers are given is well-formed, and each command is one of the launcher."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from lit_rl.launch.__main__ import main
from lit_rl.launch.options import divided, parser
from lit_rl.launch.servers import read_servers

ROOT = Path(__file__).parents[2]
SLURM, SKYPILOT = ROOT / "configs/cluster/slurm.sbatch", ROOT / "configs/cluster/skypilot.yml"
KUBERAY, SERVERS = ROOT / "configs/cluster/kuberay.yml", ROOT / "configs/cluster/servers.yml"


def launched(text: str) -> list[list[str]]:
    """The words behind `python -m lit_rl.launch` of each command of a text."""
    return [shlex.split(found) for found in re.findall(r"python -m lit_rl\.launch ([^`\n]*)", text)]


def test_slurm_starts_one_task_on_each_node(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = SLURM.read_text()
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    told = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert told["ntasks-per-node"] == "1" and told["signal"].startswith("TERM@") and "#SBATCH --requeue" in text
    own = divided(launched(text)[0])[0]
    assert int(parser().parse_args(own).grace) < int(told["signal"].partition("@")[2])
    node = {
        "SLURM_NNODES": told["nodes"],
        "SLURM_NODEID": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "NGPUS": "8",
    }
    for name, value in node.items():
        monkeypatch.setenv(name, value)
    assert main([*own, "--dry-run", "--", "fit", "--config", str(ROOT / "configs/base/fsdp.yaml")]) == 0
    assert capsys.readouterr().out.startswith("torchrun --nnodes 4 --nproc-per-node 8 ")


def test_skypilot_has_its_keys_and_hands_its_nodes_to_the_launcher() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert {"name", "num_nodes", "workdir", "resources", "file_mounts", "setup", "run"} <= task.keys()
    assert task["resources"]["accelerators"] == "H100:8" and (ROOT / task["envs"]["RUN"]).is_file()
    assert task["file_mounts"].keys() == {"/outputs"} and "--run.dir /outputs" in task["run"]
    asked = set(re.findall(r"(\w+)=\$", task["run"]))
    assert asked == {"NNODES", "NODE_RANK", "NGPUS", "MASTER_ADDR"}
    assert set(re.findall(r"SKYPILOT_\w+", task["run"])) == {
        f"SKYPILOT_{n}" for n in ("NUM_NODES", "NODE_RANK", "NUM_GPUS_PER_NODE", "NODE_IPS")
    }


def test_kuberay_has_its_keys_and_nodes_for_the_run() -> None:
    job = yaml.safe_load(KUBERAY.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert f"\nray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    pods = [cluster["headGroupSpec"]["template"]["spec"], *(group["template"]["spec"] for group in cluster["workerGroupSpecs"])]
    for pod in pods:
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert all(mount["name"] in volumes for container in pod["containers"] for mount in container["volumeMounts"])
        assert all({"name", "image", "resources"} <= container.keys() for container in pod["containers"])
    own, run = divided(launched(spec["entrypoint"])[0])
    asked, group = parser().parse_args(own), cluster["workerGroupSpecs"][0]
    assert int(asked.nodes) == group["replicas"] == group["minReplicas"] == group["maxReplicas"] and group["groupName"]
    assert int(asked.gpus_per_node) == pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert run[-2:] == ["--run.dir", "/outputs"] and int(asked.grace) < int(
        re.findall(r'STOP_WAIT_TIME_S: "(\d+)"', spec["runtimeEnvYAML"])[0]
    )


def test_the_example_of_servers_can_be_read_and_names_variables_of_a_run() -> None:
    reward, answers = read_servers(SERVERS)
    assert (reward.variable, reward.count, answers.variable, answers.gpus) == ("REWARD_SERVER_URLS", 2, "VLLM_API_BASE", 2.0)


@pytest.mark.parametrize(
    "file", [SLURM, SKYPILOT, KUBERAY, ROOT / "docs/scaling.md", ROOT / "docs/zh/scaling.md"], ids=lambda file: file.name
)
def test_each_command_is_one_of_the_launcher(file: Path) -> None:
    commands = launched(file.read_text())
    assert commands
    for words in commands:
        own, run = divided(words)
        parser().parse_args(own)
        assert run[0] == "fit"
        for path in (word for word in run if word.startswith("configs/")):
            assert (ROOT / path).is_file(), path
