"""The limits of the service, and the uploads that they hold back."""

from typing import NamedTuple

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.types import Message


class Limits(NamedTuple):
    """Hold the limits of one service.

    Attributes:
        upload_bytes: largest body of a request.
        waiting: requests that may wait while others are predicted; further ones are answered with 429.
        workers: images that are predicted at the same time.
        seconds: from the start of a request to its answer.
    """

    upload_bytes: int = 32 * 2**20
    waiting: int = 32
    workers: int = 1
    seconds: float = 60.0


class Upload:
    """The body of a request, counted while it arrives.

    Args:
        request: whose body was not read.
        max_bytes: largest body.
    """

    def __init__(self, request: Request, max_bytes: int) -> None:
        self._request = request
        self._max_bytes = max_bytes
        self._num_bytes = 0

    async def read(self) -> bytes:
        """Return the body, or the one file of a form.

        The names in a form and all other text of the client are ignored: no path and no URL is opened.

        Raises:
            HTTPException: 413 where the body is too large, 400 where a form is broken or has not exactly one file.
            starlette.requests.ClientDisconnect: the client left.
        """
        declared = self._request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise self._too_large()
        request = Request(self._request.scope, self._receive)
        # Other types are images: `curl --data-binary` sends application/x-www-form-urlencoded.
        if not request.headers.get("content-type", "").lower().startswith("multipart/"):
            return await request.body()
        async with request.form(max_files=1, max_fields=8) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            if not files:
                raise HTTPException(400, "The form has no file; expected one image, such as curl -F image=@photo.jpg")
            return await files[0].read()

    async def client_left(self) -> None:
        """Return when the client has closed the connection; the body must have been read."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    async def _receive(self) -> Message:
        message = await self._request.receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise self._too_large()
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The upload is larger than {self._max_bytes} bytes; send a smaller image")
