"""Messages: lines of JSON that a training appends to a file for whoever watches; for display, never the truth."""

import json
import os
import time
from pathlib import Path
from typing import Any


class MessageWriter:
    """Appends messages to a file. Each is one `write` call, so several processes may append to the same file."""

    def __init__(self, path: Path) -> None:
        self.path, self._torn = path, False
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, kind: str, **fields: Any) -> None:
        """Append one message with the current Unix time; an unwritable disk is not the training's problem."""
        line = json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError:
            return
        try:
            # On a full disk only a part may be written; the next message must then not be glued to it.
            data = b"\n" * self._torn + line.encode()
            self._torn = True
            self._torn = os.write(descriptor, data) < len(data)
        except OSError:
            pass
        finally:
            os.close(descriptor)


def read_messages(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Whole messages of a progress file from a byte offset on, and the offset behind them.

    A torn last line is left for the next call; a line that is not JSON is passed over, for messages are display only.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read()
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    messages = []
    for line in data[:end].splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict):
            messages.append(message)
    return messages, offset + end
