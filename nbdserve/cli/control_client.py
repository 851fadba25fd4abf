"""Asking the control socket of a server: HTTP over a Unix socket, from the standard library.

aiohttp is for the server: this way `nbdserve ctl` starts quickly.
"""

import http.client
import json
import socket
from typing import Any, Final
from urllib.parse import quote

from nbdserve.errors import ConfigError, ImageError
from nbdserve.storage.names import shown

#: A snapshot of a large image, or opening one anew, takes its time.
_TIMEOUT_S: Final = 600.0


class _UnixConnection(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


class ControlClient:
    """Asks one server, one question after the other."""

    def __init__(self, path: str) -> None:
        """Connect to nobody yet; `path` is the control socket."""
        self._path = path

    def ask(self, method: str, *where: str, body: object = None) -> Any:
        """Ask, and return what the answer's JSON says.

        Args:
            method: Of HTTP.
            where: The parts of the path behind /v1/.
            body: To be sent as JSON.

        Raises:
            ConfigError: No server is there, or it refuses the question.
            ImageError: It can't do that now, or with this image.
        """
        path = "/v1/" + "/".join(quote(part, safe="") for part in where)
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            text = response.read()
        except (FileNotFoundError, ConnectionRefusedError):
            raise ConfigError(
                f"{shown(self._path)}: no server is there: is it running, with --control?"
            ) from None
        except TimeoutError:
            raise ConfigError(
                f"{shown(self._path)}: no answer for {_TIMEOUT_S:.0f} seconds"
            ) from None
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            raise ConfigError(
                f"{shown(self._path)}: the server hung up before it answered: what was"
                " asked may be done or not; see its log"
            ) from None
        except http.client.HTTPException:
            raise ConfigError(
                f"{shown(self._path)}: this is not the control socket of nbdserve"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"{shown(self._path)}: {reason}") from None
        finally:
            connection.close()
        return self._judged(response.status, text)

    def _judged(self, status: int, text: bytes) -> Any:
        try:
            answer = json.loads(text)
        except ValueError:
            raise ConfigError(
                f"{shown(self._path)}: this is not the control socket of nbdserve"
            ) from None
        if status < 400:
            return answer
        message = answer.get("error", f"status {status}")
        if status in {400, 404}:
            raise ConfigError(message)
        raise ImageError(message)
