"""Accepts connections for a server, and closes those that it has no time or no room for; `seats` says which.

A connection costs a socket until its first bytes are there. Only then, and only with a seat, does it get buffers for
TLS and a protocol.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import socket
import ssl
import traceback
from asyncio import sslproto
from collections.abc import Callable
from dataclasses import dataclass, field

from finetune_operator.seats import Limits, Seats, Stage

logger = logging.getLogger(__name__)

BACKLOG = 1024
BATCH = 32
"""Connections that are accepted before anything else has its turn."""
PAUSE_SECONDS = 0.5
"""Before the next connection where the process has no file descriptor for one."""
TLS_BUFFER_BYTES = 32 * 1024
"""What asyncio reads at once from a connection with TLS. It keeps a buffer of that size for each of them, of 256 KiB by
default: a thousand silent peers would hold 280 MB instead of 56."""
sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
SWEPT, SWEEP_SECONDS = 64, 0.1
"""So many connections are a crowd, in which those who gave up are looked for as often."""
SHUTDOWN_SECONDS = 0.5
"""How long a peer is waited for to say farewell in TLS."""
ESTABLISHED = b"\1"
"""A connection's state in Linux's tcp_info."""
HANDSHAKE, RECORD_HEADER = b"\x16\x03", 5
"""How every TLS connection begins; after these bytes and another one comes the length of the first record."""
MAX_HELLO = 16 * 1024


@dataclass(frozen=True)
class Patience:
    """How long a connection may take. All times are in seconds."""

    silence: float = 10.0
    """To its first byte, and from there to a seat. Who is in others' way goes much earlier."""
    greeting: float = 10.0
    """For the TLS handshake and the head of the request."""
    whole: float = 15.0
    """From its seat to the last byte of the answer."""
    idle: float = 130.0
    """Between the requests of a caller who may send several."""


@dataclass(eq=False)
class Connection:
    """An accepted connection; `advance` tells how far its request is."""

    acceptor: "Acceptor"
    number: int
    socket: socket.socket
    address: str
    timer: asyncio.TimerHandle | None = None
    seated: float = 0.0
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    transport: asyncio.BaseTransport | None = field(default=None, repr=False)

    kept: bool = False
    """Its caller was proven, and may send further requests."""

    def advance(self, stage: Stage) -> None:
        self.acceptor.advance(self, stage)


Event = Callable[[str], None]
"""Called with `seated`, `refused`, `evicted` or `late`."""
Factory = Callable[[Connection], asyncio.Protocol]


class Acceptor:
    """`listen`, then every connection with a seat gets a protocol of `factory`, which calls `made` and `lost`."""

    def __init__(
        self, limits: Limits, patience: Patience, factory: Factory, context: ssl.SSLContext | None, event: Event
    ) -> None:
        """`context`: for TLS; None: plain TCP."""
        self._seats, self._patience, self._factory = Seats(limits), patience, factory
        self._event = event
        self.context = context
        """Connections that get their seat from now on are served with it."""
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._connections: dict[int, Connection] = {}
        self._again: asyncio.TimerHandle | None = None
        self._sweep_due = 0.0

    def listen(self, host: str, port: int) -> int:
        """Returns the port, which the kernel chooses where it is 0. Raises OSError."""
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._listener = socket.socket(family, kind, protocol)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(where)
            self._listener.listen(BACKLOG)
            self._listener.setblocking(False)
        except OSError:
            self._listener.close()
            raise
        self._loop.add_reader(self._listener, self._accept)
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Takes no more connections, and closes those that wait; others go on."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for connection in list(self._connections.values()):
            if not connection.seated:
                self._drop(connection)

    def drop_all(self) -> None:
        """Closes every connection at once."""
        for connection in list(self._connections.values()):
            self._drop(connection)

    def made(self, connection: Connection, transport: asyncio.BaseTransport) -> None:
        """Its protocol has a transport: the handshake is done."""
        connection.transport = transport
        if connection.number not in self._connections:
            self._abort(connection)

    def lost(self, connection: Connection) -> None:
        """Its transport is closed."""
        self._forget(connection)
        self._settle()

    def advance(self, connection: Connection, stage: Stage) -> None:
        """The head of its request is in, or more. One that is kept stays proven, and waits for its next request."""
        if connection.number not in self._connections:
            return
        now, idle = self._loop.time(), connection.kept and stage is Stage.ANSWERED
        if connection.kept and stage is Stage.ASKING:
            connection.seated = now
        self._seats.advance(connection.number, Stage.PROVEN if connection.kept else stage, now)
        self._limit(connection, self._patience.idle if idle else connection.seated + self._patience.whole - now)

    def _accept(self) -> None:
        for _ in range(BATCH):
            try:
                accepted, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.warning("no connection can be accepted: %s", error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(PAUSE_SECONDS, self._resume)
                return
            accepted.setblocking(False)
            self._sweep()
            self._arrived(accepted, str(peer[0]))

    def _sweep(self) -> None:
        """Takes those from the queue who gave up: in a crowd, none of them may cost a seat."""
        now = self._loop.time()
        if now < self._sweep_due or len(self._connections) <= SWEPT:
            return
        self._sweep_due = now + SWEEP_SECONDS
        for connection in list(self._connections.values()):
            if not connection.seated and gave_up(connection.socket):
                self._drop(connection)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _arrived(self, accepted: socket.socket, address: str) -> None:
        connection = Connection(self, next(self._numbers), accepted, address)
        self._connections[connection.number] = connection
        victim = self._seats.arrive(connection.number, address, self._loop.time())
        if victim is not None:
            self._event("refused" if victim == connection.number else "evicted")
            self._drop(self._connections[victim])
        if victim != connection.number:
            self._loop.add_reader(accepted, self._speaks, connection)
            self._limit(connection, self._patience.silence)

    def _speaks(self, connection: Connection) -> None:
        missing = unheard(connection.socket) if self.context else 0
        if missing is None:
            self._loop.remove_reader(connection.socket)
            self._event("refused")
            self._drop(connection)
            return
        # The reader is called again only when all of it is there.
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, missing))
        if missing:
            return
        self._loop.remove_reader(connection.socket)
        self._seats.speaks(connection.number, self._loop.time())
        self._settle()

    def _settle(self) -> None:
        if self._again:
            self._again.cancel()
            self._again = None
        now = self._loop.time()
        settled = self._seats.settle(now)
        for number in settled.closed:
            self._event("evicted")
            self._drop(self._connections[number])
        for number in settled.seated:
            connection = self._connections[number]
            self._event("seated")
            connection.seated = now
            self._limit(connection, self._patience.greeting)
            connection.task = self._loop.create_task(self._serve(connection))
            connection.task.add_done_callback(functools.partial(self._served, connection))
        if settled.again is not None:
            self._again = self._loop.call_at(settled.again, self._settle)

    async def _serve(self, connection: Connection) -> None:
        """Ends when the connection has its protocol, or none: a handshake that failed is no news, since strangers could
        fill the log with it."""
        seconds = self._patience.greeting if self.context else None
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._factory(connection),
                connection.socket,
                ssl=self.context,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=seconds and SHUTDOWN_SECONDS,
            )
        except (OSError, asyncio.CancelledError) as error:
            # The frames know the error and the error the frames: with all of the connection's buffers, such a circle
            # would wait for the garbage collector, thousands of times a minute.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, asyncio.CancelledError):
                raise

    def _served(self, connection: Connection, task: asyncio.Task[None]) -> None:
        connection.task = None
        if not task.cancelled() and (error := task.exception()):
            logger.error("a connection could not be served", exc_info=error)
        if connection.transport is None:
            connection.socket.close()
            self.lost(connection)

    def _limit(self, connection: Connection, seconds: float) -> None:
        if connection.timer:
            connection.timer.cancel()
        connection.timer = self._loop.call_later(max(0.0, seconds), self._late, connection)

    def _late(self, connection: Connection) -> None:
        self._event("late")
        self._drop(connection)
        self._settle()

    def _drop(self, connection: Connection) -> None:
        self._forget(connection)
        self._abort(connection)

    def _abort(self, connection: Connection) -> None:
        if isinstance(connection.transport, asyncio.WriteTransport):
            connection.transport.abort()
        elif connection.task is not None:
            connection.task.cancel()
        elif not connection.seated:
            self._loop.remove_reader(connection.socket)
            # What was never answered needs no farewell: a reset frees the port of either side at once.
            with contextlib.suppress(OSError):
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.socket.close()

    def _forget(self, connection: Connection) -> None:
        if connection.timer:
            connection.timer.cancel()
            connection.timer = None
        self._connections.pop(connection.number, None)
        self._seats.leave(connection.number)


def unheard(peer: socket.socket) -> int | None:
    """Bytes of the first TLS record that have to be there and are not: 0 once it is whole; None for what is no TLS."""
    try:
        head = peer.recv(RECORD_HEADER, socket.MSG_PEEK)
        if not head or not HANDSHAKE.startswith(head[:2]):
            return None
        if len(head) < RECORD_HEADER:
            return RECORD_HEADER
        whole = RECORD_HEADER + int.from_bytes(head[3:])
        if whole > MAX_HELLO:
            return None
        return 0 if len(peer.recv(whole, socket.MSG_PEEK)) == whole else whole
    except OSError:
        return None


def gave_up(peer: socket.socket) -> bool:
    """True where the other side has closed, also behind bytes that nobody has read. Only Linux says so."""
    if not hasattr(socket, "TCP_INFO"):
        return False
    try:
        return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != ESTABLISHED
    except OSError:
        return True
