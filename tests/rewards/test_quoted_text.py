"""DeepGen-RL's OCR scorers, its services without pickle, and its weighted rewards, against the authors' numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_proxy import RedServer, red_images

from lit_rl.credit.groups import total_reward
from lit_rl.credit.row_weights import weights_of_rows
from lit_rl.errors import ConfigError
from lit_rl.rewards.ocr_quoted import QuotedTextReward
from lit_rl.rewards.quoted_text import AllQuoted, first_quoted
from lit_rl.rewards.service import scorers
from lit_rl.rewards.services import SERVICES, ServiceReward

SWITCHES = ("OCR_SCORER_IMPL", "OCR_MIN_CONF", "OCR_NGRAM_MAX", "OCR_CASE_SENSITIVE", "OCR_IGNORE_PUNCT", "OCR_USE_CONFUSION_FOLD")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SWITCHES, *(f"{service.upper()}_URL" for service in SERVICES)):
        monkeypatch.delenv(name, raising=False)


def cases(golden_dir: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((golden_dir / "deepgen" / f"{name}.json").read_text())["cases"]
    assert found
    return found


@pytest.mark.golden
def test_both_scorers_are_the_authors(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a prompt that quotes nothing: no score here, an exception or 0 there."""
    for case in cases(golden_dir, "ocr_scores"):
        given, told = case["inputs"], case["outputs"]
        for name in SWITCHES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given["env"].items():
            monkeypatch.setenv(name, value)
        grade = first_quoted if given["impl"] == "ocr_old.py" else AllQuoted.from_environment()
        score = grade(given["prompt"], given["tokens"] or [])
        if math.isnan(score):
            assert not given["prompt"].replace('""', "").count('"') and told.get("reward", 0.0) == 0.0, case
        else:
            assert score == pytest.approx(told["reward"], abs=1e-9), case


@pytest.mark.golden
def test_rewards_are_weighted_as_the_authors_weight_them(golden_dir: Path) -> None:
    """A failed OCR is 0 there; here a row that asks for it has no score, and the others have the authors'."""
    for case in cases(golden_dir, "rewards"):
        given, told = case["inputs"], torch.tensor(case["outputs"]["total"], dtype=torch.float64)
        names, count = given["func_names"], len(told)
        info = [{"prompt": "p", "reward_weights": given["reward_configs"][i // given["rollout_n"]]} for i in range(count)]
        info = info if given["per_sample"] else [{"prompt": "p"}] * count
        missing = {name: torch.full((count,), torch.nan, dtype=torch.float64) for name in names if name not in given["raw"]}
        raw = {name: torch.tensor(values, dtype=torch.float64) for name, values in given["raw"].items()}
        weights = weights_of_rows(info, dict.fromkeys(names, 1.0))
        theirs = total_reward({name: (raw | missing)[name].nan_to_num(0.0) for name in weights}, weights)
        assert torch.allclose(theirs, told, atol=1e-5), case
        ours = total_reward({name: (raw | missing)[name] for name in weights}, weights)
        asked = torch.tensor([any(row.get("reward_weights", dict.fromkeys(names, 1)).get(name) for name in missing) for row in info])
        assert torch.equal(ours.isnan(), asked) and torch.allclose(ours[~asked], told[~asked], atol=1e-5)


def test_lines_are_graded_served_and_lost_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in engine that reads the first pixel: `OPEN`, `0PEN`, or a crash; as a reward, and as a server scores with it."""

    def engine(image: np.ndarray) -> list[tuple[str, float]]:
        if image[0, 0, 0] == 2:
            raise RuntimeError("no such glyph")
        return [("we are", 0.9), ("OPEN" if image[0, 0, 0] else "0PEN", 0.8)]

    old, new = QuotedTextReward(), QuotedTextReward(scorer="new", settings=AllQuoted(fold=False, ngrams=1))
    old._read = new._read = engine
    info = [{"prompt": 'a sign "open"'}] * 3 + [{"prompt": "a dog"}]
    images = red_images([1, 0, 2, 1])
    assert old.score(images, info)["ocr"].tolist() == pytest.approx([1.0, 0.0, math.nan, math.nan], nan_ok=True)
    assert "OCR failed on a picture of" in old.last_error and "no such glyph" in old.last_error
    assert new.score(images[:2], [{"prompt": '"OPEN" "we"'}] * 2)["ocr"].tolist() == pytest.approx([4 / 6, 3 / 6])
    pictures = list(images.permute(0, 2, 3, 1).numpy())
    rows = scorers.score_samples([old], pictures[:2], info[:2])
    assert [row["ocr"] for row in rows] == [1.0, 0.0] and rows[0]["ocr_text"] == "we are\nOPEN"  # type: ignore[index]
    monkeypatch.setenv("OCR_SCORER_IMPL", "new")
    assert isinstance(QuotedTextReward().grade, AllQuoted)
    with pytest.raises(ConfigError, match=r"1 prompts quote no text.*\n  p.txt:3: 'a dog'"):
        old.check([{"prompt": '"a"'}, {"prompt": "a dog", "where": "p.txt:3"}])
    for name, value in {"OCR_SCORER_IMPL": "both", "OCR_NGRAM_MAX": "two", "OCR_CASE_SENSITIVE": "yes"}.items():
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=name):
            QuotedTextReward()
        monkeypatch.setenv("OCR_SCORER_IMPL", "new")
        monkeypatch.delenv(name) if name != "OCR_SCORER_IMPL" else None


def test_services_are_found_by_name_variable_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {service: ServiceReward(service).urls for service in SERVICES}  # type: ignore[arg-type]
    assert ports["ocr"] == ["http://localhost:18082"] and len({url for urls in ports.values() for url in urls}) == len(SERVICES)
    monkeypatch.setenv("DEQA_URL", "10.0.0.1:2/")
    assert ServiceReward("deqa").urls == ["http://10.0.0.1:2"] and ServiceReward("deqa", urls="b:1").urls == ["http://b:1"]
    monkeypatch.setenv("DEQA_URL", "http://")
    with pytest.raises(ConfigError, match="DEQA_URL in the environment"):
        ServiceReward("deqa")
    with pytest.raises(ConfigError, match="service='gen_eval': choose one of"):
        ServiceReward("gen_eval")  # type: ignore[arg-type]
    with RedServer() as server:
        reward = ServiceReward("hps", urls=server.url, score="red")
        assert reward.score(red_images([0, 255]), [{"prompt": "p"}] * 2)["hps"].tolist() == [0, 1]
    with pytest.raises(ConfigError, match="1 prompts quote no text"):
        ServiceReward("ocr").check([{"prompt": "a dog"}])
