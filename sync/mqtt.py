"""The uplink over MQTT: batches go to `.../up`, the cloud's own acks come back on `.../ack`.

Rules:
1. MQTT 5 first; 3.1.1 only where the broker says that it does not know 5 (remembered for this run). Never without TLS
   where TLS was asked for; plaintext only to loopback.
2. Only the cloud's ack counts. A PUBACK never does, but MQTT 5's tells early why there will be none: not authorized,
   nobody listening, too large. 3.1.1's tells nothing (it acknowledges what its ACL drops), so there QoS 0 is used.
3. Subscriptions are QoS 0 on a clean session, and every SUBACK code is checked.
4. paho sends nothing again by itself: each `open` makes a new client, and no client outlives its connection.
5. paho runs on the event loop (its socket is watched there): no thread, but for name lookup, connect and handshake.
6. The ack timer runs only while our bytes are on the other side: a slow line is no silent cloud.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import ssl
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from config.agent import Uplink as UplinkSettings
from sync.identity import GatewayName, Secret, require_private
from sync.uplink import AckTimeout, BatchRefused, LinkDown, RetryLater, UplinkError
from sync.wire import Ack, Nack, Sealed, WireError, decode_reply

log = logging.getLogger(__name__)

Key: TypeAlias = tuple[int, int, int]
"""Epoch, first and last seq of a batch."""

TLS_PORT: Final = 8883
PLAIN_PORT: Final = 1883
_PACKET_OVERHEAD: Final = 16  #: fixed header, topic length, packet id, property length (MQTT 5, 3.3)
_EARLY_ACKS: Final = (
    64  #: acks that came after their send had timed out; the next send of the batch is answered by them
)

_SLICES: Final = (
    4  #: of the ack timeout: how often a waiting send looks whether its bytes are still on their way
)

# MQTT 5 reason codes (OASIS MQTT 5.0, 2.4)
_NO_MATCHING_SUBSCRIBERS: Final = 0x10
_UNSUPPORTED_PROTOCOL: Final = 0x84
_NOT_AUTHORIZED: Final = 0x87
_PACKET_TOO_LARGE: Final = 0x95
_QUOTA_EXCEEDED: Final = 0x97
_QUOTA_WAIT_S: Final = 5.0
_FAILURE: Final = 0x80  #: this and above


class MqttUplink:
    """`sync.uplink.Uplink` over MQTT."""

    def __init__(
        self,
        gateway: GatewayName,
        settings: UplinkSettings,
        secret: Secret,
        *,
        session: str = "",
        on_command: Callable[[bytes], None] | None = None,
    ) -> None:
        """Raises `IdentityError` for plaintext to anywhere but loopback. `on_command` is called on the loop with what
        comes on the `cmd` topic. `session` tells two uplinks of one gateway apart: a broker keeps one connection for
        each client id."""
        require_private("uplink.host", settings.host, tls="on" if settings.tls else "off")
        self.port = settings.port or (TLS_PORT if settings.tls else PLAIN_PORT)
        self.name = f"mqtt {settings.host}:{self.port}"
        self.protocol = paho.MQTTv5  #: what is spoken; 3.1.1 once the broker has refused 5
        self._gateway = gateway
        self._settings = settings
        self._secret = secret
        self._session = session
        self._on_command = on_command
        self._client: paho.Client | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: socket.socket | None = None
        self._misc: asyncio.TimerHandle | None = None
        self._connected: asyncio.Future[ReasonCode] | None = None
        self._subscribed: asyncio.Future[list[ReasonCode]] | None = None
        self._waiting: dict[Key, asyncio.Future[Ack]] = {}
        self._by_mid: dict[int, Key] = {}
        self._early: deque[Ack] = deque(maxlen=_EARLY_ACKS)
        self._max_packet = 0  #: what the broker says it takes; 0: it says nothing

    # --- the contract ---

    async def open(self) -> None:
        await self.close()
        try:
            try:
                await self._connect()
            except _Unsupported:
                log.info("%s does not speak MQTT 5: MQTT 3.1.1 is used", self.name)
                self.protocol = paho.MQTTv311
                await self.close()
                await self._connect()
            await self._subscribe()
        except _Unsupported as err:
            await self.close()
            raise LinkDown(f"{self.name}: the broker speaks neither MQTT 5 nor 3.1.1") from err
        except BaseException:
            await self.close()
            raise

    async def send(self, batch: Sealed) -> Ack:
        key = (batch.epoch, batch.first, batch.last)
        for early in self._early:
            if _covers(early, key):
                self._early.remove(early)
                return early
        client = self._client
        if client is None:
            raise LinkDown(f"{self.name}: not connected")
        topic = self._gateway.topic("up")
        size = len(batch.payload) + len(topic) + _PACKET_OVERHEAD
        if self._max_packet and size > self._max_packet:
            raise BatchRefused(
                f"{self.name} takes packets of {self._max_packet} bytes; this one has {size}", "size"
            )
        answer: asyncio.Future[Ack] = asyncio.get_running_loop().create_future()
        self._waiting[key] = answer
        mid = 0
        try:
            mid = self._publish(client, topic, batch.payload, qos=1 if self.protocol == paho.MQTTv5 else 0)
            self._by_mid[mid] = key
            return await self._answer(client, answer, key)
        finally:
            if self._waiting.get(key) is answer:
                del self._waiting[key]
            self._by_mid.pop(mid, None)

    async def report(self, state: bytes) -> None:
        if self._client is None:
            raise LinkDown(f"{self.name}: not connected")
        topic = self._gateway.topic("state")
        size = len(state) + len(topic) + _PACKET_OVERHEAD
        if (
            self._max_packet and size > self._max_packet
        ):  # the broker would close the connection, again and again
            log.debug("%s takes packets of %d bytes; a heartbeat has %d", self.name, self._max_packet, size)
            return
        self._publish(self._client, topic, state, qos=0)

    async def close(self) -> None:
        client, self._client = self._client, None
        if self._misc is not None:
            self._misc.cancel()
            self._misc = None
        if client is not None:
            with contextlib.suppress(OSError, ValueError):
                client.disconnect()
        self._drop_socket()
        self._fail(LinkDown(f"{self.name}: closed"))

    # --- opening ---

    async def _connect(self) -> None:
        """TCP, TLS and the broker's yes. Raises `LinkDown` naming the step that failed, `_Unsupported`."""
        loop = self._loop = asyncio.get_running_loop()
        client = self._new_client()
        self._connected = loop.create_future()
        connecting = loop.run_in_executor(None, self._dial, client)
        try:
            await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(lambda _: _hang_up(client))
            raise
        sock = client.socket()
        if not isinstance(sock, socket.socket):
            raise LinkDown(f"{self.name}: connect: the broker closed at once", "refused")
        self._client = client
        self._socket = sock
        loop.add_reader(sock, self._readable)
        self._tick()
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                reason = await self._connected
        except TimeoutError as err:
            raise LinkDown(
                f"{self.name}: login: no answer within {self._settings.connect_timeout_s:g} s; is it an MQTT broker,"
                f" and is tls = {str(self._settings.tls).lower()} right?",
                "silent",
            ) from err
        if reason.value >= _FAILURE:
            if reason.value == _UNSUPPORTED_PROTOCOL:
                raise _Unsupported
            raise LinkDown(
                f"{self.name}: login as {self._gateway}: {reason}; check the gateway's name and token",
                "credential",
            )

    def _new_client(self) -> paho.Client:
        v5 = self.protocol == paho.MQTTv5
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            # ":" is in no tenant's or gateway's name, so no two names share a client id. (NATS refuses a ".".)
            client_id=f"{self._gateway.tenant}:{self._gateway.gateway}{self._session}",
            clean_session=None if v5 else True,
            protocol=self.protocol,
            reconnect_on_failure=False,
        )
        client.username_pw_set(str(self._gateway), self._secret.reveal())
        if self._settings.tls:
            try:
                context = ssl.create_default_context(cafile=self._settings.ca_file)
            except (OSError, ssl.SSLError) as err:
                raise LinkDown(
                    f"{self.name}: TLS: cannot read ca_file {self._settings.ca_file}: {err}", "tls"
                ) from err
            client.tls_set_context(context)
        client.connect_timeout = self._settings.connect_timeout_s
        client.max_inflight_messages_set(4 * self._settings.window)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_socket_close = self._on_socket_close
        return client

    def _dial(self, client: paho.Client) -> None:
        """Blocking: on a thread."""
        # paho gives up one keepalive after an unanswered ping, which it sends after one keepalive of silence.
        keepalive_s = max(2, round(self._settings.keepalive_s * 0.75))
        try:
            if self.protocol == paho.MQTTv5:
                client.connect(self._settings.host, self.port, keepalive_s, clean_start=True)
            else:
                client.connect(self._settings.host, self.port, keepalive_s)
        except socket.gaierror as err:
            raise LinkDown(f"{self.name}: DNS: {self._settings.host}: {err.strerror}", "dns") from err
        except UnicodeError as err:
            raise LinkDown(f"{self.name}: DNS: {self._settings.host} is no host name: {err}", "dns") from err
        except ssl.SSLError as err:
            said = getattr(err, "verify_message", "") or err.reason or str(err)
            raise LinkDown(
                f"{self.name}: TLS: {said}; check uplink.ca_file, host and the clock", "tls"
            ) from err
        except TimeoutError as err:
            raise LinkDown(f"{self.name}: connect: no answer", "timeout") from err
        except OSError as err:
            raise LinkDown(f"{self.name}: connect: {err.strerror or err}", "refused") from err

    async def _subscribe(self) -> None:
        if self._client is None:  # the broker took us in and threw us out in one breath
            raise LinkDown(f"{self.name}: the broker closed the connection right after the login")
        topics = [self._gateway.topic("ack")]
        if self._on_command is not None:
            topics.append(self._gateway.topic("cmd"))
        self._subscribed = asyncio.get_running_loop().create_future()
        self._client.subscribe([(topic, 0) for topic in topics])
        self._watch_writes()
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                codes = await self._subscribed
        except TimeoutError as err:
            raise LinkDown(f"{self.name}: subscribe: no answer", "silent") from err
        for topic, code in zip(topics, codes, strict=False):
            if code.value >= _FAILURE:
                raise LinkDown(
                    f"{self.name}: subscribe to {topic}: {code}; check the broker's ACL", "credential"
                )

    # --- sending ---

    def _publish(self, client: paho.Client, topic: str, payload: bytes, *, qos: int) -> int:
        info = client.publish(topic, payload, qos)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise LinkDown(f"{self.name}: {paho.error_string(info.rc)}")
        self._watch_writes()
        return info.mid

    async def _answer(self, client: paho.Client, answer: asyncio.Future[Ack], key: Key) -> Ack:
        """The ack, or `AckTimeout` once all has been on the other side for `ack_timeout_s`."""
        quiet = 0
        while quiet < _SLICES:
            try:
                async with asyncio.timeout(self._settings.ack_timeout_s / _SLICES):
                    return await asyncio.shield(answer)
            except TimeoutError:
                # A dead line ends this too: the keepalive closes it.
                under_way = client is self._client and (client.want_write() or self._unsent_bytes())
                quiet = 0 if under_way else quiet + 1
        raise AckTimeout(f"no ack for {key[1]}..{key[2]} within {self._settings.ack_timeout_s:g} s")

    def _unsent_bytes(self) -> int:
        """What the kernel holds and the other side has not yet received (tcp(7), SIOCOUTQ)."""
        if self._socket is None:
            return 0
        try:
            held = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        except OSError:
            return 0
        return int(struct.unpack("i", held)[0])

    # --- paho on the loop ---

    def _readable(self) -> None:
        client = self._client
        if client is None:
            return
        while client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS:
            sock = client.socket()
            # What TLS has decrypted already is not seen by the selector.
            if not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
                break
        self._watch_writes()

    def _writable(self) -> None:
        if self._client is not None:
            self._client.loop_write()
            if self._socket is not None and not self._client.want_write():
                asyncio.get_running_loop().remove_writer(self._socket)

    def _watch_writes(self) -> None:
        if self._client is not None and self._socket is not None and self._client.want_write():
            asyncio.get_running_loop().add_writer(self._socket, self._writable)

    def _tick(self) -> None:
        """paho's keepalive."""
        if self._client is not None:
            self._client.loop_misc()
            self._watch_writes()
            every_s = max(0.5, min(5.0, self._settings.keepalive_s / 8))
            self._misc = asyncio.get_running_loop().call_later(every_s, self._tick)

    def _drop_socket(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            loop = self._loop
            if loop is not None and not loop.is_closed() and sock.fileno() >= 0:
                loop.remove_reader(sock)
                loop.remove_writer(sock)
            with contextlib.suppress(OSError):
                sock.close()

    def _fail(self, error: UplinkError) -> None:
        for future in (self._connected, self._subscribed, *self._waiting.values()):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # one that nobody awaits any more is no fault
        self._connected = self._subscribed = None
        self._waiting.clear()
        self._by_mid.clear()

    # --- paho's callbacks, all on the loop (but for the socket's closing while it dials) ---

    def _on_connect(
        self,
        _client: paho.Client,
        _data: object,
        _flags: object,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        self._max_packet = getattr(properties, "MaximumPacketSize", 0)
        if self._connected is not None and not self._connected.done():
            self._connected.set_result(reason)

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        if self._subscribed is not None and not self._subscribed.done():
            self._subscribed.set_result(codes)

    def _on_publish(
        self, _client: paho.Client, _data: object, mid: int, reason: ReasonCode, _properties: object
    ) -> None:
        key = self._by_mid.pop(mid, None)
        answer = self._waiting.get(key) if key is not None else None
        if answer is None or answer.done():
            return
        error: UplinkError
        match reason.value:
            case _ if reason.packetType != PacketTypes.PUBACK or reason.value == 0:
                return
            case _ if reason.value == _NO_MATCHING_SUBSCRIBERS:
                error = AckTimeout(f"{self.name}: no cloud is listening there")
            case _ if reason.value == _NOT_AUTHORIZED:
                error = LinkDown(
                    f"{self.name}: publish to {self._gateway.topic('up')}: {reason}; check the ACL",
                    "credential",
                )
            case _ if reason.value == _PACKET_TOO_LARGE:
                error = BatchRefused(f"{self.name}: {reason}", "size")
            case _ if reason.value == _QUOTA_EXCEEDED:
                error = RetryLater(f"{self.name}: {reason}", _QUOTA_WAIT_S)
            case _:
                error = AckTimeout(f"{self.name}: publish: {reason}")
        answer.set_exception(error)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        if message.topic.endswith("/cmd"):
            if self._on_command is not None:
                self._on_command(bytes(message.payload))
            return
        try:
            reply = decode_reply(bytes(message.payload))
        except WireError as err:
            log.warning("%s: an ack that cannot be read: %s", self.name, err)
            return
        if isinstance(reply, Ack):
            answered = [key for key in self._waiting if _covers(reply, key)]
            for key in answered:
                if not self._waiting[key].done():
                    self._waiting[key].set_result(reply)
            if not answered:
                self._early.append(reply)
            return
        answer = self._waiting.get((reply.epoch, reply.first, reply.last))
        if answer is not None and not answer.done():
            answer.set_exception(refusal(reply))

    def _on_disconnect(
        self, client: paho.Client, _data: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        if client is self._client:
            self._client = None
            if self._misc is not None:
                self._misc.cancel()
                self._misc = None
            self._fail(LinkDown(f"{self.name}: the connection ended: {reason}"))

    def _on_socket_close(self, _client: paho.Client, _data: object, sock: object) -> None:
        if sock is self._socket:
            self._drop_socket()


class _Unsupported(Exception):
    """The broker does not know this version of MQTT."""


def refusal(nack: Nack) -> UplinkError:
    """A nack as the error that it means."""
    if nack.retry_after_s is not None:
        return RetryLater(f"{nack.code}: {nack.text}", nack.retry_after_s)
    return BatchRefused(nack.text, nack.code)


def _covers(ack: Ack, key: Key) -> bool:
    epoch, first, last = key
    return ack.epoch == epoch and any(a <= first and last <= b for a, b in ack.ranges)


def _hang_up(client: paho.Client) -> None:
    sock = client.socket()
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.close()
