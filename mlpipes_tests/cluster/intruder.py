"""What an intruder's pod does: knock at every TCP port of the addresses that it is given, and print those that open.

`python intruder.py ADDRESS…`; the last line is an object of lists of ports by address. Nothing of the project is imported.
"""

import asyncio
import json
import resource
import sys

_PORTS = range(1, 65536)
_AT_ONCE = 12_000
_SECONDS = 4.0
"""How long a port that says nothing is waited for."""


async def _knock(address: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_SECONDS):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def _all(addresses: list[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {address: [] for address in addresses}
    todo = iter([(address, port) for port in _PORTS for address in addresses])

    async def knocks() -> None:
        for address, port in todo:
            if await _knock(address, port):
                found[address].append(port)

    await asyncio.gather(*(knocks() for _ in range(_AT_ONCE)))
    return found


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    assert most > _AT_ONCE, f"{most} files may be open"
    print(json.dumps({address: sorted(ports) for address, ports in asyncio.run(_all(sys.argv[1:])).items()}))
