"""Whether the server in this container answers; the health check of the image `serve`."""

import http.client
import ssl
import sys


def answers(connection: http.client.HTTPConnection) -> bool:
    """Whether it says that it is ready."""
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):  # nobody is there, or it speaks the other one of the two
        return False


# Its own certificate is for the name by which others know it.
encrypted = http.client.HTTPSConnection("127.0.0.1", 8100, timeout=4, context=ssl._create_unverified_context())  # noqa: S323
sys.exit(not (answers(http.client.HTTPConnection("127.0.0.1", 8100, timeout=4)) or answers(encrypted)))
