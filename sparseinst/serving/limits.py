"""The limits of the service, and the uploads that they hold back."""

import asyncio
import contextlib
from typing import NamedTuple

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.types import Message

# Longest time for which the rest of a refused upload is read and dropped.
_DRAIN_SECONDS = 10.0


class Limits(NamedTuple):
    """What one service accepts.

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
        self._has_started = self._is_complete = False

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

    async def drain(self) -> None:
        """Drop the rest of a refused upload, because a client that is still sending would not read the answer."""
        waits_for_permission = self._request.headers.get("expect", "").lower() == "100-continue"
        if waits_for_permission and not self._has_started:
            return
        self._max_bytes = float("inf")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drop(), _DRAIN_SECONDS)

    async def client_left(self) -> None:
        """Return when the client has closed the connection; the body must have been read."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    async def _drop(self) -> None:
        while not self._is_complete:
            await self._receive()

    async def _receive(self) -> Message:
        message = await self._request.receive()
        self._has_started = True
        self._num_bytes += len(message.get("body", b""))
        self._is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        if self._num_bytes > self._max_bytes:
            raise self._too_large()
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The upload is larger than {self._max_bytes} bytes; send a smaller image")
