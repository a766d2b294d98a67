"""What a user of bare Ray Train writes: digits by TorchTrainer, with DDP, a DataLoader, and a checkpoint an epoch.

Run as a Ray job by the benchmark `start`: `python bare_ray.py WORKERS BATCH EPOCHS FOLDER`; the times of its first step and
of its training go into FOLDER. It imports nothing of this project's but the network.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(config: dict[str, Any]) -> None:
    """One worker's training."""
    import ray.train
    import torch
    from ray.train.torch import prepare_data_loader, prepare_model
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    from mlpipes.workloads.networks import digits_network

    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    rows = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8)[:1258], torch.tensor(labels)[:1258])
    loader = prepare_data_loader(DataLoader(rows, config["batch"] // config["workers"], shuffle=True, drop_last=True))
    model = prepare_model(digits_network(1, 10, 32))
    optimizer, rank = torch.optim.AdamW(model.parameters(), lr=3e-3), ray.train.get_context().get_world_rank()
    begun, first = time.time(), None
    for epoch in range(config["epochs"]):
        for batch, target in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
            first = first or time.time()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/state.pt")
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"epoch": epoch}, checkpoint=checkpoint)
    if rank == 0:
        times = {"first": first, "training_seconds": time.time() - begun}
        Path(config["folder"], "times.json").write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    workers, batch, epochs = map(int, sys.argv[1:4])
    TorchTrainer(
        train,
        train_loop_config={"workers": workers, "batch": batch, "epochs": epochs, "folder": sys.argv[4]},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name="bare", storage_path=sys.argv[4]),
    ).fit()
