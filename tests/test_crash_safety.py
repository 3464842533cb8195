"""examples/crash_safe.py, killed by SIGKILL again and again, ends with the bits of a training that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crashing import LIMIT, PIECES, crash_safe, live

KILLS, EVERY, STEPS = 20, 2, 160  # a life makes two checkpoints, or few more
VARIANTS = {
    "adamw": ["--max-grad-norm=0.5"],
    "adamw-split": ["--dtype=bfloat16", "--master-weights=split", "--state-dtype=bfloat16", "--ema-decay=0.9"],
    "adam-stochastic": ["--optimizer=adam", "--dtype=bfloat16", "--rounding=stochastic", "--state-dtype=int8"],
    "radam-ema": ["--optimizer=radam", "--ema-decay=0.99"],
    "adagrad": ["--optimizer=adagrad"],
}
# Where half of the kills land, for certain; the others land anywhere.
MARKED = [
    "writing", "stepping", "written", "writing", "stepped", "writing", "stepping", "renamed", "writing", "stepping",
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed(variant: str, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return [f"--folder={tmp_path / name}", f"--steps={STEPS}", f"--every={EVERY}", *VARIANTS[variant]]

    wanted = live(arguments("undisturbed")).answer
    g = random.Random(variant)
    died: Counter[str] = Counter()
    for number in range(KILLS):
        if number % 2 == 0:
            what = MARKED[number // 2]
            life = live(arguments("killed"), stop_at=(what, g.randint(1, 2 * PIECES if what == "writing" else 2)))
            assert life.reports[-1] == what
        else:
            reports = g.randint(1, 2 * (2 * EVERY + PIECES + 2))  # in two checkpoints and the steps before them
            life = live(arguments("killed"), kill_behind=(reports, g.uniform(0, 0.003)))
        assert life.was_killed, f"kill {number} came too late: {life}"
        died[life.reports[-1]] += 1
        died["unfinished"] += any((tmp_path / "killed").glob("*" + crash_safe.UNFINISHED))
    assert died["writing"] >= MARKED.count("writing") and died["unfinished"] >= MARKED.count("writing"), died
    assert all(died[what] for what in MARKED), died
    life = live(arguments("killed"))
    assert life.answer == wanted, f"not the bits of an undisturbed training, after kills while {dict(died)}"
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == [f"step-{step:09}.pt" for step in (STEPS - EVERY, STEPS)]  # those to keep, and no unfinished one


def test_a_program_is_killed(tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        return [sys.executable, crash_safe.__file__, f"--folder={tmp_path / name}", "--steps=1000", "--every=20"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command("killed"), env=environment) as process:
        for _ in range(1000 * LIMIT):
            if list(tmp_path.glob("killed/*.pt")):
                break
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    again = subprocess.run(
        command("killed"), env=environment, capture_output=True, text=True, timeout=LIMIT, check=True
    ).stdout.splitlines()
    assert again[0].startswith("goes on behind step ")
    assert again[1].endswith(live(command("undisturbed")[2:]).answer)


# --- what a checkpoint has to hold -----------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def change_state(change: Callable[[torch.Tensor], torch.Tensor], name: str) -> Change:
    return lambda checkpoint: [s.update({name: change(s[name])}) for s in checkpoint["optimizer"]["state"].values()]


CHANGES: dict[str, Change] = {
    "model": lambda checkpoint: checkpoint["model"]["0.weight"].add_(0.01),
    "moments": change_state(lambda moment: moment * 2, "exp_avg_sq"),
    "step_counts": change_state(lambda step: step - 1, "step"),
    "averages": change_state(lambda ema: ema * 2, "ema"),
    "lr": lambda checkpoint: checkpoint["optimizer"]["param_groups"][0].update(lr=0.02),
    "scheduler": lambda checkpoint: checkpoint["scheduler"].update(last_epoch=0),
    "python": lambda checkpoint: checkpoint["random"].update(python=random.Random(9).getstate()),
    "numpy": lambda checkpoint: checkpoint["random"]["numpy"][1][:300].zero_(),
    "torch": lambda checkpoint: checkpoint["random"]["torch"].copy_(torch.Generator().manual_seed(9).get_state()),
    "position": lambda checkpoint: checkpoint.update(step=checkpoint["step"] - 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_of_a_checkpoint_counts(change: str, tmp_path: Path) -> None:
    argv = [f"--folder={tmp_path}", "--steps=20", "--every=10", "--ema-decay=0.9"]
    wanted = crash_safe.main(argv)
    last = tmp_path / "step-000000020.pt"
    last.unlink()
    checkpoint = crash_safe.load_latest(tmp_path)
    assert checkpoint is not None and checkpoint["step"] == 10
    assert crash_safe.main(argv) == wanted
    last.unlink()
    CHANGES[change](checkpoint)
    crash_safe.save_atomically(checkpoint, tmp_path / "step-000000010.pt")
    assert crash_safe.main(argv) != wanted


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    assert crash_safe.load_latest(tmp_path) is None
    unfinished = tmp_path / ("step-000000999.pt" + crash_safe.UNFINISHED)
    unfinished.write_bytes(b"half of a checkpoint")
    assert crash_safe.load_latest(tmp_path) is None
    for step in (5, 90, 100, 1000):
        crash_safe.save({"step": step}, tmp_path, keep=2)
        assert crash_safe.load_latest(tmp_path) == {"step": step}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000100.pt", "step-000001000.pt"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.pt"
    crash_safe.save_atomically({"step": 1}, path)
    with pytest.raises(TypeError, match="cannot pickle"):
        crash_safe.save_atomically({"step": 1, "large": torch.ones(100), "not to pickle": (_ for _ in ())}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(f"fsync {target.name} {target.stat().st_size > 500 if target.is_file() else 'folder'}")
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {source.name} {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    crash_safe.save_atomically({"values": torch.ones(100)}, tmp_path / "a.pt")
    assert calls == ["fsync a.pt.unfinished True", "replace a.pt.unfinished a.pt", f"fsync {tmp_path.name} folder"]
