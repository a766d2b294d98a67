"""The command line, whose batch inference waits before its fourth chunk, for ever; to be killed there."""

import time
from pathlib import Path

from mlpipes.cli.app import app
from mlpipes.serving import batch
from mlpipes.serving.tables import Chunk

HELD = 3
_answer = batch._answer


def answer(chunk: Chunk, place: Path) -> int:
    """As the real one, but for one chunk."""
    while chunk.number == HELD:
        time.sleep(1)
    return _answer(chunk, place)


if __name__ == "__main__":
    from mlpipes_tests.serving import held_batch

    batch._answer = held_batch.answer  # by this name, the processes that compute find it
    app()
