"""Download images that clients give as http(s) URLs, from public addresses only."""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import socket
import ssl
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

from vlm._version import __version__
from vlm.errors import first_line
from vlm.serving.bodies import HELD
from vlm.serving.limits import Limits, RequestError, busy

SECONDS = 10.0  # for all downloads of a request, from waiting for a slot to the last byte
SLOTS, SLOTS_PER_REQUEST = 16, 4  # downloads at a time
REQUESTS = 64  # requests with downloads at a time
REDIRECTS = 3
EVENTS, EVENT_BYTES = 1024, 64  # pieces of a reply that may be small, and the mean of others
PORTS = {"http": 80, "https": 443}
_UNICAST = ipaddress.ip_network("2000::/3")  # outside: loopback, mapped, NAT64, local, multicast
_TUNNELS = tuple(map(ipaddress.ip_network, ("2001::/23", "2002::/16")))  # may hold IPv4 addresses
# Protocol assignments, 6to4 relays, and an address of Azure that only virtual machines reach.
_LOCAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))

logger = logging.getLogger(__name__)


class _FetchError(Exception):
    """A failed download; the reason is for the log, never for the client."""


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, which an answer may be fetched from."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        local = found.is_multicast or any(found in network for network in _LOCAL)
    else:
        local = found not in _UNICAST or any(found in network for network in _TUNNELS)
    return found.is_global and not local


class Fetcher:
    """Downloads of one server: a bounded number, apart from decoding and tokenizing."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._slots = asyncio.Semaphore(SLOTS)
        self._requests = 0
        self._resolver = ThreadPoolExecutor(4, "vlm-resolve")

    async def fetch_all(self, urls: Mapping[str, str]) -> dict[str, bytes | RequestError]:
        """Download the images of one request, by the name of each in error messages.

        All failures have the same message, so that nobody can explore a network from here.

        Raises:
            RequestError: too many requests with downloads (429).
        """
        if self._requests >= REQUESTS:
            raise busy("it downloads images for other requests", SECONDS)
        self._requests += 1
        own = asyncio.Semaphore(SLOTS_PER_REQUEST)
        left = [self.limits.body_bytes]  # bytes for all images together, as if they were sent
        try:
            found = await asyncio.gather(
                *(self._fetch_one(name, url, own, left) for name, url in urls.items())
            )
        finally:
            self._requests -= 1
        return dict(zip(urls, found, strict=True))

    def close(self) -> None:
        """Stop the threads that resolve names."""
        self._resolver.shutdown(wait=False, cancel_futures=True)

    async def _fetch_one(
        self, name: str, url: str, own: asyncio.Semaphore, left: list[int]
    ) -> bytes | RequestError:
        try:
            async with asyncio.timeout(SECONDS), own, self._slots:
                return await self._follow(url, left)
        except RequestError as error:
            return error
        except (_FetchError, OSError, ValueError, h11.ProtocolError, TimeoutError) as error:
            reason = first_line(error) or type(error).__name__
            logger.info("an image was not downloaded: %r: %s", url[:200], reason)
            return RequestError(
                f"{name} could not be downloaded: check that its URL is public, answers within "
                f"{SECONDS:g} s, and leads to an image of at most {self.limits.body_bytes:,} bytes",
                400,
                "url_not_fetched",
            )

    async def _follow(self, url: str, left: list[int]) -> bytes:
        for _ in range(REDIRECTS + 1):
            parts = urlsplit(url)
            reply = await self._get(parts, left)
            if isinstance(reply, bytes):
                return reply
            url = urljoin(url, reply)
        raise _FetchError(f"more than {REDIRECTS} redirects")

    async def _get(self, parts: SplitResult, left: list[int]) -> bytes | str:
        """Return the body of a reply, or the URL that it redirects to."""
        host = (parts.hostname or "").encode("idna").decode()
        if parts.scheme not in PORTS or not host or parts.username is not None:
            raise _FetchError("not an http(s) URL of a host")
        port = PORTS[parts.scheme]
        if parts.port not in (None, port):
            raise _FetchError(f"a port other than {port}")
        context = self._tls if parts.scheme == "https" else None
        # Connect to an address that was checked: the name might resolve to another one later.
        reader, writer = await asyncio.open_connection(
            await self._address(host, port),
            port,
            limit=1 << 16,
            ssl=context,
            server_hostname=host if context else None,
        )
        try:
            return await self._exchange(reader, writer, parts, host, left)
        finally:
            writer.transport.abort()

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def _address(self, host: str, port: int) -> str:
        """Resolve a name; all of its addresses must be public."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._resolver, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not is_public(address):
                raise _FetchError(f"{host} has the address {address}, which is not public")
        # Prefer IPv4: many servers have no route for IPv6.
        return min(addresses, key=lambda address: ":" in address)

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        parts: SplitResult,
        host: str,
        left: list[int],
    ) -> bytes | str:
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        request = h11.Request(
            method="GET",
            target=quote(target, safe="%/:=&?~+!$,;'@()*[]"),
            headers=[
                ("Host", f"[{host}]" if ":" in host else host),
                ("User-Agent", f"vlm/{__version__}"),
                ("Accept", "image/*"),
                ("Accept-Encoding", "identity"),
                ("Connection", "close"),
            ],
        )
        writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
        body, events = bytearray(), 0
        while True:
            event = connection.next_event()
            events += 1
            if events > EVENTS + len(body) // EVENT_BYTES:
                raise _FetchError("too many small pieces")
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response):
                if event.status_code in (301, 302, 303, 307, 308):
                    return dict(event.headers).get(b"location", b"").decode("ascii")
                if event.status_code != 200:
                    raise _FetchError(f"status {event.status_code}")
            elif isinstance(event, h11.Data):
                left[0] -= len(event.data)
                if left[0] < 0:
                    raise _FetchError("too many bytes")
                with contextlib.suppress(LookupError):
                    HELD.get().add(len(event.data))
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif not isinstance(event, h11.InformationalResponse):
                raise _FetchError("the connection closed early")
