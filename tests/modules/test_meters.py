import math
import random

import torch

from lit_rl.modules.meters import KEPT, Meters


def alone(rows):
    return [rows]


def take_in(meters: Meters, numbers: list[tuple[float, float]]) -> None:
    for value, weight in numbers:
        meters.mean({"a": torch.tensor(value), "b": value, "c": torch.tensor(value, dtype=torch.bfloat16)}, weight=torch.tensor(weight))
        meters.largest({"top": torch.tensor(value, requires_grad=True)})
        meters.count("seen")


def test_means_are_those_of_doubles_added_in_order() -> None:
    numbers = [(random.Random(i).uniform(-1, 1), float(i % 3)) for i in range(10)]
    meters = Meters()
    take_in(meters, numbers)
    total = weights = 0.0
    for value, weight in numbers:
        total, weights = total + torch.tensor(value).item() * weight, weights + weight
    found = meters.read(alone)
    assert found["a"] == total / weights
    assert found["b"] == sum(v * w for v, w in numbers) / weights
    assert found["top"] == max(torch.tensor(v).item() for v, _ in numbers) and found["seen"] == 10
    assert not meters and meters.read(alone) == {}


def test_numbers_do_not_depend_on_when_they_are_read_copied_or_stored() -> None:
    numbers = [(random.Random(i).gauss(0, 1), random.Random(-i).random()) for i in range(KEPT)]
    whole = Meters()
    take_in(whole, numbers)
    meters = Meters()
    for start in range(0, len(numbers), 37):
        take_in(meters, numbers[start : start + 37])
        restored = Meters()
        restored.load_state_dict(meters.copy().state_dict() if start % 2 else meters.state_dict())
        meters = restored
    assert meters.read(alone) == whole.read(alone)


def test_a_copy_stays_as_it_was() -> None:
    meters = Meters()
    meters.mean({"a": 1.0})
    before = meters.copy()
    meters.mean({"a": 3.0})
    assert before.read(alone) == {"a": 1.0} and meters.read(alone) == {"a": 2.0}


def test_what_weighs_nothing_does_not_count_and_nan_does() -> None:
    meters = Meters()
    meters.mean({"a": torch.tensor(math.nan)}, weight=torch.tensor(0.0))
    meters.mean({"a": 2.0}, weight=torch.tensor(3))
    meters.mean({"never": math.inf}, weight=0)
    meters.mean({"lost": math.nan})
    for value in (1.0, math.nan, 5.0):
        meters.largest({"top": torch.tensor(value)})
    found = meters.read(alone)
    assert found["a"] == 2.0 and found["never"] == 0.0
    assert math.isnan(found["lost"]) and math.isnan(found["top"])
