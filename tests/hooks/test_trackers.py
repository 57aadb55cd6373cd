"""`session.log()` in wandb and MLflow, offline: what rank 0 logs is what they keep. Skipped where they are not installed."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commpress

Logged = list[tuple[int, dict[str, float]]]
STEPS, EVERY = 8, 4


def windows() -> Logged:
    """Train under DDP, with buffers as a second role; return each window's last step and `session.log()`."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)))
    session = commpress.attach(model, "int4", buffers="int8")
    found: Logged = []
    for step in range(STEPS):
        model(torch.randn(16, 64)).square().mean().backward()
        if step % EVERY == EVERY - 1:
            found.append((step, session.log()))
    return found


def with_mlflow(folder: str) -> tuple[Logged, dict[str, list[tuple[int, float]]]]:
    logged, kept = windows(), {}
    if torch.distributed.get_rank() == 0:
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        with mlflow.start_run() as run:
            for step, numbers in logged:
                mlflow.log_metrics(numbers, step)
        client = mlflow.MlflowClient()
        for name in client.get_run(run.info.run_id).data.metrics:
            kept[name] = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
    return logged, kept


def with_wandb(folder: str) -> tuple[Logged, dict[str, float]]:
    logged, kept = windows(), {}
    if torch.distributed.get_rank() == 0:
        import wandb

        with wandb.init(mode="offline", project="commpress", dir=folder) as run:
            for step, numbers in logged:
                run.log(numbers, step=step, commit=True)
            kept = {name: run.summary[name] for name in (*logged[-1][1], "_step")}
    return logged, kept


@pytest.mark.slow
def test_mlflow_keeps_every_name_value_and_step(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: it is in no extra")
    (logged, kept), _ = run(2, with_mlflow, str(tmp_path), timeout=180)
    names = set(logged[0][1])
    assert {"commpress/ratio", "commpress/gradients/ratio", "commpress/buffers/sent_mb_per_step"} <= names
    assert kept == {name: [(step, numbers[name]) for step, numbers in logged] for name in names}


@pytest.mark.slow
def test_wandb_keeps_every_name_and_value(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: it is in no extra")
    with mock.patch.dict(os.environ, {"WANDB_SILENT": "true"}):
        (logged, kept), _ = run(2, with_wandb, str(tmp_path), timeout=180)
    assert kept == {**logged[-1][1], "_step": STEPS - 1}
