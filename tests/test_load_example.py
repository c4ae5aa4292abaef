"""The shipped example can be trained again."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecnn.load import load_model


@pytest.mark.slow
def test_training_lenet5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples_dir: Path) -> None:
    monkeypatch.syspath_prepend(str(examples_dir.parent))
    from examples.train_lenet5 import main

    assert main(tmp_path) > 0.97
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lenet5_digits.pt2",
        "lenet5_digits.safetensors",
    ]
    assert load_model(tmp_path / "lenet5_digits.pt2").spec.labels == tuple("0123456789")
