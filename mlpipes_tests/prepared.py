"""An empty MLflow store, made once for a test run: its schema takes the 5 CPU-seconds of all of MLflow's migrations."""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

_MAKE = "import sys; from mlpipes.tracking.runs import Tracker; Tracker(sys.argv[1])"


def mlflow_store(file: Path) -> str:
    """Have an empty store in a file, where it is not there yet; returns its address.

    All processes of a run share `tempfile.gettempdir()`, which goes with the run (see leftovers).
    """
    template = Path(tempfile.gettempdir()) / f"mlflow-{version('mlflow')}-{os.getuid()}.db"
    if not file.exists():
        with FileLock(f"{template}.lock"):
            if not template.exists():
                # In a process of its own: SQLAlchemy keeps what it has opened. Renamed when it is whole.
                unfinished = template.with_suffix(".unfinished")
                subprocess.run([sys.executable, "-c", _MAKE, f"sqlite:///{unfinished}"], check=True)
                unfinished.replace(template)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template, file)
    return f"sqlite:///{file}"
