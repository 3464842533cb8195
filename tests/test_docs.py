"""The code in the documents runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import require

DOCS = Path(__file__).parent.parent / "docs"
# How many blocks of Python run, one after the other, from the first on; those behind them need what is not there.
RUN = {"schedules.md": None, "lr_finder.md": 1}


@pytest.mark.parametrize("name", RUN)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the document shows no training around it
def test_code_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("matplotlib", "sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= (RUN[name] or 9)
    found: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in blocks[: RUN[name]]:
            exec(compile(block, name, "exec"), found)
    if name == "schedules.md":
        assert len(found["ensemble"]) == 3
    else:
        assert found["result"].plot().figure is not None and (tmp_path / "lr_finder.png").exists()
