"""What an intruder's pod does: knock at every TCP port of the addresses that it is given, and print those that open.

`python intruder.py ADDRESS…`; the last line is an object of lists of ports by address. Nothing of the project is imported.
"""

import contextlib
import json
import resource
import select
import socket
import sys
import time

_AT_ONCE = 8000
_SECONDS = 2.5
"""How long is waited for ports that say nothing, once all of a batch have been knocked at."""


def _open(doors: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those that open. No timer runs while they are knocked at: a busy machine is slow, not closed."""
    with contextlib.ExitStack() as stack:
        waiting, poll, found = {}, select.poll(), []
        for door in doors:
            knock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            knock.setblocking(False)
            knock.connect_ex(door)
            poll.register(knock, select.POLLOUT)
            waiting[knock.fileno()] = knock, door
        end = time.monotonic() + _SECONDS
        while waiting:
            answered = poll.poll(max(0.0, end - time.monotonic()) * 1000)
            if not answered:
                break
            for number, _ in answered:
                knock, door = waiting.pop(number)
                poll.unregister(number)
                if knock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    found.append(door)
        return found


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    assert most > _AT_ONCE, f"{most} files may be open"
    everything = [(address, port) for port in range(1, 65536) for address in sys.argv[1:]]
    result: dict[str, list[int]] = {address: [] for address in sys.argv[1:]}
    for start in range(0, len(everything), _AT_ONCE):
        for address, port in _open(everything[start : start + _AT_ONCE]):
            result[address].append(port)
    print(json.dumps({address: sorted(ports) for address, ports in result.items()}))
