"""The pictures of a chat request: data URLs, uploaded files and, from listed hosts alone, URLs. All come as bytes of a
file that is small enough and of a format that is read here."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import secrets
import socket
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image
from yarl import URL

from infer.server.errors import ApiError, of_user_error
from phi4rv.errors import UserError
from phi4rv.processing.images import image_size

FETCH_SECONDS = 10.0
MOST_REDIRECTS = 3
# Few decoders are few chances: Pillow knows dozens of formats.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")


def check_picture(content: bytes, most_pixels: int, place: str) -> None:
    """ApiError 415 for another format, 413 for more pixels (nothing is decoded yet), 400 for a broken header."""
    too_large = ApiError(413, f"{place}: more than {most_pixels} pixels", place, "image_too_large")
    webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    if not content.startswith(_SIGNATURES) and not webp:
        raise ApiError(415, f"{place}: not a PNG, JPEG, WebP, GIF or BMP picture", place, "unsupported_image")
    try:
        width, height = image_size(content, place)
    except UserError as error:
        bomb = isinstance(error.__cause__, Image.DecompressionBombError)
        raise (too_large if bomb else of_user_error(error)) from None
    if width * height > most_pixels:
        raise too_large


@dataclass(frozen=True)
class Upload:
    """An uploaded picture. ``created``: seconds since 1970."""

    id: str
    filename: str
    content: bytes
    purpose: str
    created: int

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        return len(self.content) + 1024

    def described(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass
class Uploads:
    """Uploaded files, in memory; the least recently used go when there are more than ``most_bytes``."""

    most_bytes: int
    held: OrderedDict[str, Upload] = field(default_factory=OrderedDict)
    size: int = 0

    def add(self, filename: str, content: bytes, purpose: str) -> Upload:
        # Who knows an id may use the file, so ids cannot be guessed.
        upload = Upload(f"file-{secrets.token_hex(16)}", filename, content, purpose, int(time.time()))
        if upload.size > self.most_bytes:
            raise ApiError(413, f"file: {len(content)} bytes; all files together may have {self.most_bytes}", "file")
        self.held[upload.id] = upload
        self.size += upload.size
        while self.size > self.most_bytes:
            self.size -= self.held.popitem(last=False)[1].size
        return upload

    def get(self, name: str, place: str) -> Upload:
        if name not in self.held:
            message = f"{place}: there is no file {name[:60]!r}; it was never uploaded, deleted, or displaced by others"
            raise ApiError(404, message, place, "file_not_found")
        self.held.move_to_end(name)
        return self.held[name]

    def remove(self, name: str) -> None:
        self.size -= self.get(name, "file_id").size
        del self.held[name]


class _PublicAddresses(AbstractResolver):
    """Names resolve to public addresses alone: a listed name must not lead into the network the server stands in."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        public = [one for one in found if ipaddress.ip_address(one["host"]).is_global]
        if not public:
            raise OSError(f"{host} has no public address")
        return public

    async def close(self) -> None:
        await self._resolver.close()


class Pictures:
    """Finds a request's pictures. ``hosts``: those that URLs may name, ``host`` (ports 80 and 443) or ``host:port``;
    a private address only if it is listed itself."""

    def __init__(self, hosts: tuple[str, ...], uploads: Uploads, most_bytes: int, most_pixels: int):
        self.uploads, self.most_bytes, self.most_pixels = uploads, most_bytes, most_pixels
        self._hosts = {host.lower() for host in hosts}

    async def find(self, source: str, place: str) -> bytes:
        """The bytes that a data URL, a file id or a URL stands for. ApiError 400, 404, 413, 415 or 504."""
        if source.startswith("data:"):
            content = _of_data_url(source, place)
        elif source.startswith(("http://", "https://")):
            content = await self._fetch(source, place)
        elif source.startswith("file-"):
            return self.uploads.get(source, place).content  # checked when it was uploaded
        else:
            raise ApiError(400, f"{place}: must be a data: URL or the id of an uploaded file", place)
        check_picture(content, self.most_pixels, place)
        return content

    def _allowed(self, text: str, place: str) -> URL:
        try:
            url = URL(text)
            host, port = (url.host or "").lower(), url.port
        except ValueError:
            raise ApiError(400, f"{place}: not a URL", place) from None
        listed = f"{host}:{port}" in self._hosts or (host in self._hosts and port in (80, 443))
        if url.scheme not in ("http", "https") or not listed or url.user is not None or url.password is not None:
            message = f"{place}: URLs of {host[:100] or 'no host'} are not fetched here; send a data: URL or upload it"
            raise ApiError(400, message, place, "url_not_allowed")
        return url

    async def _fetch(self, text: str, place: str) -> bytes:
        url = self._allowed(text, place)
        connector = aiohttp.TCPConnector(resolver=_PublicAddresses(), force_close=True)
        limit = aiohttp.ClientTimeout(total=FETCH_SECONDS)
        headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
        session = aiohttp.ClientSession(
            connector=connector, timeout=limit, headers=headers, cookie_jar=aiohttp.DummyCookieJar()
        )
        try:
            async with session:
                for _ in range(MOST_REDIRECTS + 1):
                    async with session.get(url, allow_redirects=False) as response:
                        if response.status in (301, 302, 303, 307, 308):
                            target = response.headers.get("Location", "")
                            url = self._allowed(str(url.join(URL(target))), place)
                            continue
                        if response.status != 200:
                            raise ApiError(400, f"{place}: {url.host} answered {response.status}", place)
                        return await self._body(response, place)
        except TimeoutError:
            raise ApiError(504, f"{place}: {url.host} did not answer in {FETCH_SECONDS:.0f} s", place) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiError(400, f"{place}: cannot be fetched ({type(error).__name__})", place) from None
        raise ApiError(400, f"{place}: more than {MOST_REDIRECTS} redirects", place)

    async def _body(self, response: aiohttp.ClientResponse, place: str) -> bytes:
        content = bytearray()
        async for piece in response.content.iter_chunked(1 << 16):
            content += piece
            if len(content) > self.most_bytes:
                raise ApiError(413, f"{place}: larger than {self.most_bytes} bytes", place, "image_too_large")
        return bytes(content)


def _of_data_url(url: str, place: str) -> bytes:
    head, comma, encoded = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ApiError(400, f"{place}: must be data:image/…;base64,… with the picture's bytes", place)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{place}: not base64", place) from None
