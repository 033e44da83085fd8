"""`.env`: values of variables that the environment lacks; placeholders of its template are none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_rl.errors import ConfigError
from lit_rl.net import env_file
from lit_rl.net.env_file import place_of, read_env_file, use_env_file, why_unset
from lit_rl.net.environment import HUB, SECRETS, VARIABLES, redacted

ROOT = Path(__file__).parents[2]
GUIDE = ("GBOX_API_KEY", "HF_ENDPOINT", "HF_TOKEN", "WANDB_API_KEY", "WANDB_PROJECT", "VLLM_API_BASE")
"""Variables of the guide's `.env`."""
KEPT = ("PATH", "HOME", "LANG")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name in KEPT})
    monkeypatch.setattr(env_file, "_of_file", set())
    monkeypatch.chdir(tmp_path)


def test_lines_are_those_of_a_shell(tmp_path: Path) -> None:
    """With what editors on other systems leave: a mark at the beginning, CRLF, no newline at the end."""
    text = "\ufeffA=1\r\nexport B = two words # a comment\r\n\r\n# C=3\r\nD='#4'\r\nE=\"a\\nb\"\r\nF=http://x/#y\r\nG=\r\nH=${A}0"
    (tmp_path / ".env").write_bytes(text.encode())
    found = {"A": "1", "B": "two words", "D": "#4", "E": "a\nb", "F": "http://x/#y", "G": "", "H": "10"}
    assert read_env_file(tmp_path / ".env") == found


@pytest.mark.parametrize(("text", "line"), [("A=1\n\nnonsense here\nB=2", 3), ("KEY\n", 1), ("A=1\nB='open\n", 2)])
def test_a_line_that_is_none_is_told(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(text)
    with pytest.raises(ConfigError, match=rf"\.env:{line}: .* begins no line KEY=VALUE"):
        use_env_file()


def test_the_environment_comes_before_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GBOX_API_KEY=of-file\nVLLM_API_BASE=http://file:1/v1\nWANDB_PROJECT=file\nMINE=7\n")
    os.environ |= {"GBOX_API_KEY": "of-process", "VLLM_API_BASE": "", "WANDB_PROJECT": "your_project"}
    use_env_file()
    assert {name: os.environ[name] for name in ("GBOX_API_KEY", "VLLM_API_BASE", "WANDB_PROJECT", "MINE")} == {
        "GBOX_API_KEY": "of-process",
        "VLLM_API_BASE": "http://file:1/v1",
        "WANDB_PROJECT": "file",
        "MINE": "7",
    }
    assert (place_of("GBOX_API_KEY"), place_of("MINE")) == ("the environment", ".env")


def test_placeholders_are_unset_wherever_they_stand(tmp_path: Path) -> None:
    """A container hands the template's values over as its environment; nothing may send them anywhere."""
    (tmp_path / ".env").write_text((ROOT / "env.example").read_text())
    os.environ |= {"HF_TOKEN": "your_hf_token_if_needed", "WANDB_API_KEY": "your_wandb_api_key", "OTHER": "your_own"}
    use_env_file()
    assert not {"GBOX_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "HF_ENDPOINT"} & os.environ.keys()
    assert (os.environ["VLLM_API_BASE"], os.environ["WANDB_PROJECT"]) == ("http://localhost:8000/v1", "cua-grpo")
    assert os.environ["OTHER"] == "your_own"  # nobody's of ours


def test_why_a_key_is_missing(tmp_path: Path) -> None:
    assert why_unset("GBOX_API_KEY") == f"it is not in the environment, and {tmp_path}/.env is not there"
    (tmp_path / ".env").write_text("A=1")
    assert why_unset("GBOX_API_KEY") == f"it is not in the environment, and {tmp_path}/.env has none"
    (tmp_path / ".env").write_text("GBOX_API_KEY=your_gbox_api_key_here")
    assert why_unset("GBOX_API_KEY") == "it holds the template's placeholder"


def test_the_template_has_the_guides_variables() -> None:
    text = (ROOT / "env.example").read_text()
    assert [name for name in GUIDE if f"{name}=" not in text] == []
    known = {*SECRETS, *HUB, *(variable.name for variable in VARIABLES), "GBOX_CLIENT_BASE_URL"}
    assert set(re.findall(r"^#? ?([A-Z_]+)=", text, re.MULTILINE)) <= known
    assert "\n.env\n" in (ROOT / ".gitignore").read_text()


def test_secrets_are_redacted() -> None:
    os.environ |= {"GBOX_API_KEY": "gbox-123456", "HF_TOKEN": "abc"}  # the second would be found in other words
    assert redacted("key: gbox-123456, url: http://me:word@host/abc") == "key: ***, url: http://***@host/abc"


def test_the_hub_is_asked_where_the_file_says(tmp_path: Path) -> None:
    """The hub's client reads HF_ENDPOINT and HF_TOKEN when it is imported; what reads the file imports none of it."""
    (tmp_path / ".env").write_text("HF_ENDPOINT=https://hf-mirror.com # for users in China\nHF_TOKEN=hf_mine\n")
    script = (
        "import sys; from lit_rl.net.env_file import use_env_file; use_env_file(); assert 'huggingface_hub' not in sys.modules\n"
        "import huggingface_hub as hub; from huggingface_hub import constants; print(constants.ENDPOINT, hub.get_token())"
    )
    said = subprocess.check_output([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True)
    assert said.split() == ["https://hf-mirror.com", "hf_mine"]


def test_programs_read_the_file_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import cli
    from lit_rl import judges
    from lit_rl.replay.__main__ import main as replay
    from lit_rl.rewards import server

    (tmp_path / ".env").write_text("not a line")
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", "run.yaml"])
    with pytest.raises(SystemExit):
        cli.main()
    assert (replay(["gone.jsonl"]), judges.main(["unigenbench", "--dry-run"]), server.main(["--port", "0"])) == (2, 2, 2)
    assert capsys.readouterr().err.count(".env:1: 'not a line' begins no line KEY=VALUE") == 4
