"""FSDP2 on 2 and 4 ranks, a rank killed by SIGKILL again and again, ends with the bits of a training that was not."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from crashing_ranks import crash_safe_fsdp2, live

pytestmark = pytest.mark.xdist_group("ranks")

EVERY, STEPS = 2, 60
KILLS = {2: 20, 4: 6}  # by the number of ranks


@pytest.mark.parametrize("size", KILLS)
def test_killed_and_resumed(size: int, tmp_path: Path) -> None:
    rounding = "stochastic" if size == 2 else "nearest"

    def arguments(name: str) -> list[str]:
        return [f"--folder={tmp_path / name}", f"--steps={STEPS}", f"--every={EVERY}", f"--rounding={rounding}"]

    wanted, _ = live(size, arguments("undisturbed"))
    assert len(set(wanted)) == size, "parts of ranks differ"
    g = random.Random(size)
    died: Counter[str] = Counter()
    for number in range(KILLS[size]):
        rank = 0 if number % 5 == 4 else g.randrange(size)
        what = ("saving", "stepped", "saved", "saving", "renamed")[number % 5]
        answers, last = live(size, arguments("killed"), (rank, what, g.randint(1, 2), g.choice([0, 0.0005, 0.005])))
        assert not answers, f"kill {number} came too late"
        died[last] += 1
        died["unfinished"] += any((tmp_path / "killed").glob("*" + crash_safe_fsdp2.UNFINISHED))
    assert died["saving"] and died["unfinished"] and died["stepped"], died
    answers, _ = live(size, arguments("killed"))
    assert answers == wanted, f"not the bits of an undisturbed training, after kills while {dict(died)}"
