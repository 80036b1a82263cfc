"""The images of a chat request: data URLs, uploaded files and, from listed hosts alone, URLs. All are checked to be
files of limited size in a supported format."""

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

from infer.server.errors import ApiError, from_user_error
from phi4rv.errors import UserError
from phi4rv.processing.images import image_size

FETCH_TIMEOUT = 10.0
MAX_REDIRECTS = 3
# Few decoders are a small attack surface: Pillow knows dozens of formats.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")


def check_image(content: bytes, max_pixels: int, place: str) -> None:
    """ApiError 415 for another format, 413 for more pixels (nothing is decoded yet), 400 for a broken header."""
    too_large = ApiError(413, f"{place}: more than {max_pixels} pixels", place, "image_too_large")
    webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    if not content.startswith(_SIGNATURES) and not webp:
        raise ApiError(415, f"{place}: not a PNG, JPEG, WebP, GIF or BMP picture", place, "unsupported_image")
    try:
        width, height = image_size(content, place)
    except UserError as error:
        bomb = isinstance(error.__cause__, Image.DecompressionBombError)
        raise (too_large if bomb else from_user_error(error)) from None
    if width * height > max_pixels:
        raise too_large


@dataclass(frozen=True)
class UploadedFile:
    """An uploaded image. ``created``: seconds since 1970."""

    id: str
    filename: str
    content: bytes
    purpose: str
    created: int

    @property
    def size(self) -> int:
        """Bytes of memory, approximately."""
        return len(self.content) + 1024

    def to_json(self) -> dict[str, Any]:
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
class FileStore:
    """Uploaded files, in memory; beyond ``max_bytes`` the least recently used are evicted."""

    max_bytes: int
    files: OrderedDict[str, UploadedFile] = field(default_factory=OrderedDict)
    size: int = 0

    def add(self, filename: str, content: bytes, purpose: str) -> UploadedFile:
        # Whoever knows an id may use the file, so ids cannot be guessed.
        file = UploadedFile(f"file-{secrets.token_hex(16)}", filename, content, purpose, int(time.time()))
        if file.size > self.max_bytes:
            raise ApiError(413, f"file: {len(content)} bytes; all files together may have {self.max_bytes}", "file")
        self.files[file.id] = file
        self.size += file.size
        while self.size > self.max_bytes:
            self.size -= self.files.popitem(last=False)[1].size
        return file

    def get(self, name: str, place: str) -> UploadedFile:
        if name not in self.files:
            message = f"{place}: there is no file {name[:60]!r}; it was never uploaded, deleted, or displaced by others"
            raise ApiError(404, message, place, "file_not_found")
        self.files.move_to_end(name)
        return self.files[name]

    def remove(self, name: str) -> None:
        self.size -= self.get(name, "file_id").size
        del self.files[name]


class _PublicResolver(AbstractResolver):
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


class MediaConnector:
    """Fetches a request's images. ``hosts``: those that URLs may name, ``host`` (ports 80 and 443) or ``host:port``;
    a private address only if it is listed itself."""

    def __init__(self, hosts: tuple[str, ...], files: FileStore, max_bytes: int, max_pixels: int):
        self.files, self.max_bytes, self.max_pixels = files, max_bytes, max_pixels
        self._hosts = {host.lower() for host in hosts}

    async def fetch_image(self, source: str, place: str) -> bytes:
        """The bytes of the image at a data URL, a file id or a URL. ApiError 400, 404, 413, 415 or 504."""
        if source.startswith("data:"):
            content = _decode_data_url(source, place)
        elif source.startswith(("http://", "https://")):
            content = await self._download(source, place)
        elif source.startswith("file-"):
            return self.files.get(source, place).content  # checked when it was uploaded
        else:
            raise ApiError(400, f"{place}: must be a data: URL or the id of an uploaded file", place)
        check_image(content, self.max_pixels, place)
        return content

    def _checked_url(self, text: str, place: str) -> URL:
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

    async def _download(self, text: str, place: str) -> bytes:
        url = self._checked_url(text, place)
        connector = aiohttp.TCPConnector(resolver=_PublicResolver(), force_close=True)
        limit = aiohttp.ClientTimeout(total=FETCH_TIMEOUT)
        headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
        session = aiohttp.ClientSession(
            connector=connector, timeout=limit, headers=headers, cookie_jar=aiohttp.DummyCookieJar()
        )
        try:
            async with session:
                for _ in range(MAX_REDIRECTS + 1):
                    async with session.get(url, allow_redirects=False) as response:
                        if response.status in (301, 302, 303, 307, 308):
                            target = response.headers.get("Location", "")
                            url = self._checked_url(str(url.join(URL(target))), place)
                            continue
                        if response.status != 200:
                            raise ApiError(400, f"{place}: {url.host} answered {response.status}", place)
                        return await self._read_body(response, place)
        except TimeoutError:
            raise ApiError(504, f"{place}: {url.host} did not answer in {FETCH_TIMEOUT:.0f} s", place) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiError(400, f"{place}: cannot be fetched ({type(error).__name__})", place) from None
        raise ApiError(400, f"{place}: more than {MAX_REDIRECTS} redirects", place)

    async def _read_body(self, response: aiohttp.ClientResponse, place: str) -> bytes:
        content = bytearray()
        async for piece in response.content.iter_chunked(1 << 16):
            content += piece
            if len(content) > self.max_bytes:
                raise ApiError(413, f"{place}: larger than {self.max_bytes} bytes", place, "image_too_large")
        return bytes(content)


def _decode_data_url(url: str, place: str) -> bytes:
    head, comma, encoded = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ApiError(400, f"{place}: must be data:image/…;base64,… with the picture's bytes", place)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{place}: not base64", place) from None
