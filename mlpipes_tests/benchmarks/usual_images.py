"""What a user writes without this project: CIFAR-10 by torchvision and a DataLoader, by itself or by Ray Train with DDP.

Run by the benchmark `peers`: `python usual_images.py FOLDER WORKERS`; 0 workers is a plain script, which computes on all
CPUs. FOLDER has the images (`data.npz`), and gets a line after each epoch: its accuracy, and when. Network, optimizers and
learning rates are this project's; reading, augmenting and distributing are everybody's.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

BATCH, EPOCHS = 256, 8


def train(config: dict[str, Any]) -> None:
    """One worker's training."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    from mlpipes.workloads.base import DataInfo
    from mlpipes.workloads.image_classification import cifar10
    from mlpipes_tests.benchmarks.vision import UsualImages

    workers, folder, rank = config["workers"], Path(config["folder"]), 0
    data = np.load(folder / "data.npz")
    rows = UsualImages(data["image"], data["label"])
    held, labels = torch.from_numpy(data["validation_image"]), torch.from_numpy(data["validation_label"])
    facts = {"mean": [0.0] * 3, "std": [1.0] * 3, "shape": [3, 32, 32]}  # the loader normalizes
    hp = cifar10.hyperparameters()
    model = cifar10.build_model(hp, DataInfo({"class_names": [str(n) for n in range(10)]}, facts))
    cifar10.initialize(model, hp, {"image": rows.normalized(data["image"][:5000]).numpy()})
    optimizers = cifar10.optimizers(model, hp)
    loader = DataLoader(rows, BATCH // max(1, workers), shuffle=True, drop_last=True)
    network = model
    if workers:
        import ray.train
        from ray.train.torch import prepare_data_loader, prepare_model

        torch.set_num_threads(1)
        rank = ray.train.get_context().get_world_rank()
        loader, network = prepare_data_loader(loader), prepare_model(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    steps, step = EPOCHS * len(loader), 0
    for epoch in range(EPOCHS):
        network.train()
        for batch, target in loader:
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                optimizer.zero_grad()
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * cifar10.learning_rate_factor(step / steps, hp)
            logits = network(batch)
            torch.nn.functional.cross_entropy(logits, target, label_smoothing=hp.label_smoothing).backward()
            for optimizer in optimizers:
                optimizer.step()
            step += 1
        if rank == 0:
            model.eval()
            with torch.no_grad():
                found = model(rows.normalized(held.numpy())).argmax(1)
            accuracy = float((found == labels).float().mean())
            with (folder / "epochs.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"epoch": epoch + 1, "accuracy": accuracy, "time": time.time()}) + "\n")
        if workers:
            import ray.train

            ray.train.report({"epoch": epoch})


if __name__ == "__main__":
    place, count = sys.argv[1], int(sys.argv[2])
    if count == 0:
        train({"folder": place, "workers": 0})
    else:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            train,
            train_loop_config={"folder": place, "workers": count},
            scaling_config=ScalingConfig(num_workers=count),
            run_config=RunConfig(name="usual", storage_path=place),
        ).fit()
