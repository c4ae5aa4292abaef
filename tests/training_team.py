"""What each of several processes runs in the tests: training with its share of every batch.

    torchrun --nproc-per-node 2 training_team.py FOLDER norm|plain

writes the weights of each process to FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import training

from edgecnn.train.checkpoint import Checkpoint
from edgecnn.train.loop import train
from edgecnn.train.settings import TrainSettings

SETTINGS = TrainSettings(
    epochs=3,
    learning_rate=0.05,
    batch_size=16,
    warmup_epochs=0.5,
    precision="float32",
    augment=(),
    clip_norm=2.0,
)


def main() -> None:
    torch.set_num_threads(1)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    settings = replace(SETTINGS, ema_decay=0.5, patience=9, augment=("crop",)) if kind == "norm" else SETTINGS
    model = training.make_model(norm=kind == "norm")
    result = train(
        model,
        training.train_data(),
        settings,
        seed=3,
        checkpoint=Checkpoint(folder / "a.checkpoint", interval_seconds=0.0),
    )
    torch.save(result.model.graph.state_dict(), folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
