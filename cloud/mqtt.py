"""The MQTT door: a client of the broker that takes batches and heartbeats from it and answers each gateway.

Rules:
1. The topic names the gateway: the broker's access list lets a gateway publish on its own topics only, and intake
   refuses a batch whose envelope says otherwise.
2. Everything goes at QoS 0 on a clean session. The broker's word is worth nothing here: an agent resends until it has
   our ack, which is made after the journal's commit. What is lost in the broker has not left the agent's buffer.
3. MQTT 5 first, 3.1.1 where the broker has only that; TLS is never downgraded. Every SUBACK code is checked.
4. One connection, driven by the event loop: no thread, no lock. Whatever has come in when intake is ready is one
   group: one `append`, one answer per gateway.
5. What waits for intake is bounded, and waits gateway by gateway (`cloud.fairness`); above the bound a batch of the
   longest queue is answered "try again" from its head alone. What is over a quota waits nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import socket
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloud.fairness import FairQueue
from cloud.intake import Arrival, Intake, StateError, Verdict, busy, merge, over_quota
from cloud.journal.contract import JournalError
from cloud.metrics import Metrics
from sync.identity import TOPIC_ROOT, IdentityError, Secret, parse_topic
from sync.wire import MAX_BATCH_BYTES, Nack, WireError, claimed, encode_reply, open_head

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

    import config.cloud

log = logging.getLogger(__name__)
T = TypeVar("T")
_QUICKACK: Final = socket.TCP_QUICKACK

DOOR: Final = "mqtt"
CONNECT_TIMEOUT_S: Final = 10.0
IDLE_TIMEOUT_S: Final = 10.0  #: at stop, for what has come in to be answered
BACKOFF_MIN_S: Final = 0.1
BACKOFF_MAX_S: Final = 2.0  #: the whole fleet waits for this one client, and there is no herd of it
GROUP: Final = 2048  #: batches given to intake at once
GROUPS: Final = 2  #: under way at once: one is judged while the other is committed
NACKS_PER_S: Final = 50  #: to one gateway that is over its quota
READ_BYTES: Final = 256 * 1024
MISC_S: Final = 1.0  #: how often paho looks at its keepalive
_SILENT: Final = "the broker is silent: no answer to a ping within the keepalive"
MAX_TOPICS: Final = 20_000  #: parsed topics kept
#: Topic and properties beside the payload; a larger packet the broker keeps to itself (MQTT 5, 3.1.2.11.4).
MAX_PACKET_BYTES: Final = MAX_BATCH_BYTES + 4096


class _Down(Exception):
    """This connection is over, or never came to be; the text says why and what to do."""


class _OnlyOldProtocol(_Down):
    """The broker does not speak MQTT 5."""


class _Client(paho.Client):
    """paho, with a fast way in for the one packet that comes by the thousand: PUBLISH at QoS 0.

    paho reads a packet's header byte by byte, one system call each, and builds some fifty objects for the properties of
    an MQTT 5 message that has none: 55 µs a message. Here the socket is read in large pieces, whole QoS 0 messages are
    cut out of them, and paho is given the bytes of all other packets (`_sock_recv`), one at a time. A message larger
    than `MAX_PACKET_BYTES` is skipped as it comes and never held.
    """

    _ahead = b""  #: read and not yet used, from `_at`
    _at = 0
    _skip = 0  #: bytes of an oversized message still to come

    def __init__(
        self,
        take: Callable[[bytes, bytes], None],
        too_large: Callable[[], None],
        protocol: MQTTProtocolVersion,
    ) -> None:
        five = protocol == MQTTProtocolVersion.MQTTv5
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=f"headgate-cloud-{secrets.token_hex(6)}",
            clean_session=None if five else True,  # 5 says it at connect
            protocol=protocol,
            reconnect_on_failure=False,
        )
        self._has_properties = five
        self._take = take
        self._too_large = too_large

    def _sock_recv(self, bufsize: int) -> bytes:
        if self._at >= len(self._ahead):
            raise BlockingIOError
        piece = self._ahead[self._at : self._at + bufsize]
        self._at += len(piece)
        return piece

    def receive(self) -> bool:
        """Read once and use what came. Returns whether more may be waiting. Raises `_Down`."""
        try:
            data = super()._sock_recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as err:
            raise _Down(f"connection lost: {err}") from err
        if not data:
            raise _Down("the broker closed the connection")
        if isinstance(sock := self.socket(), socket.socket):
            # A broker that coalesces (Mosquitto, unless told otherwise) sends the next batch when this is acknowledged,
            # which Linux delays by 40 ms: beside a busy gateway everybody waited for that. It must be said each time
            # (tcp(7)).
            with contextlib.suppress(OSError):  # it has gone meanwhile: the next read says so
                sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        full = len(data) == READ_BYTES
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._ahead = self._ahead[self._at :] + data
        self._at = 0
        while self._at < len(self._ahead) and self._packet():
            pass
        sock = self.socket()
        return full or (isinstance(sock, ssl.SSLSocket) and sock.pending() > 0)

    def _packet(self) -> bool:
        """Use one packet. Returns whether there was a whole one."""
        data, at = self._ahead, self._at
        if (
            self._in_packet["command"] or data[at] & 0xF6 != 0x30
        ):  # paho is within a packet, or it is not QoS 0
            code = self.loop_read()
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
                raise _Down(f"connection lost: {paho.error_string(code)}")
            return True
        start, length = _varint(data, at + 1)
        if start < 0:
            return False
        end = start + length
        if length > MAX_PACKET_BYTES:
            self._too_large()
            self._skip = max(0, end - len(data))
            self._at = min(end, len(data))
            return True
        if end > len(data):
            return False
        topic_at = start + 2
        payload_at = topic_at + int.from_bytes(data[start:topic_at], "big")
        topic = data[topic_at:payload_at]
        if self._has_properties and payload_at < end:
            after, properties = _varint(data[payload_at : min(end, payload_at + 4)], 0)
            payload_at = payload_at + after + properties if after > 0 else end + 1
        elif self._has_properties:
            payload_at = end + 1
        if payload_at > end:
            raise _Down("connection lost: malformed PUBLISH")
        self._at = end
        self._take(topic, data[payload_at:end])
        return True


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Where the number ends, and the number (MQTT 5, 1.5.5); -1 where it is not all there. Raises `_Down`."""
    value = 0
    for i in range(4):
        if at + i >= len(data):
            return -1, 0
        byte = data[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if not byte & 0x80:
            return at + i + 1, value
    raise _Down("connection lost: malformed length")


class MqttDoor:
    """`run()` is one task for the life of the server. `connected` is whether batches can come in now."""

    def __init__(
        self,
        settings: config.cloud.MqttDoor,
        password: Secret,
        intake: Intake,
        metrics: Metrics,
        *,
        max_waiting: int = 4096,
        max_waiting_bytes: int = 64 * 1024 * 1024,
        rng: random.Random | None = None,
    ) -> None:
        self._settings = settings
        self._password = password
        self._intake = intake
        self._metrics = metrics
        self._rng = rng or random.Random()
        self._port = settings.port or (8883 if settings.tls else 1883)
        self._topics: dict[bytes, tuple[str, str]] = {}
        self._waiting: FairQueue[Arrival] = FairQueue(most=max_waiting, most_bytes=max_waiting_bytes)
        self._nacks: dict[str, int] = {}  # made of what is over the quota in this second, by gateway
        self._nacks_at_s = 0.0
        self._states: dict[str, bytes] = {}
        self._arrived = asyncio.Event()
        self._state_arrived = asyncio.Event()
        self._session: _Session | None = None
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._busy = 0  #: groups under way
        self.trouble = "not yet connected"  #: why not connected

    @property
    def connected(self) -> bool:
        return self._session is not None

    # --- the connection ---

    async def run(self) -> None:
        """Keep the door open until `stop`."""
        async with asyncio.TaskGroup() as group:
            drains = [group.create_task(self._drain(), name=f"mqtt-intake-{n}") for n in range(GROUPS)]
            drains.append(group.create_task(self._keep_states(), name="mqtt-states"))
            await self._stay_connected()
            await self._until_idle()
            for task in drains:
                task.cancel()

    async def stop(self) -> None:
        """Take nothing more; what has come in is still answered."""
        self._stopping.set()
        if self._session is not None:
            self._session.refuse_more()
        await self._until_idle()
        if self._session is not None:
            self._session.close()

    async def _until_idle(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                await self._idle.wait()

    async def _stay_connected(self) -> None:
        protocol = MQTTProtocolVersion.MQTTv5
        backoff_s = BACKOFF_MIN_S
        down_since: float | None = None
        first = True
        while not self._stopping.is_set():
            session = _Session(self, self._settings, self._port, self._password, protocol)
            try:
                await session.open()
                if self._stopping.is_set():
                    return
                self._session = session
                if not first or down_since is not None:
                    lasted = f" after {time.monotonic() - down_since:.0f} s" if down_since is not None else ""
                    log.info("mqtt door open again%s", lasted)
                else:
                    version = "5" if protocol == MQTTProtocolVersion.MQTTv5 else "3.1.1"
                    log.info("mqtt door open: %s:%d, MQTT %s", self._settings.host, self._port, version)
                first, down_since, backoff_s = False, None, BACKOFF_MIN_S
                await session.lost
                protocol = MQTTProtocolVersion.MQTTv5
                raise _Down(session.why)
            except _OnlyOldProtocol:
                if protocol == MQTTProtocolVersion.MQTTv5:
                    protocol = MQTTProtocolVersion.MQTTv311
                    continue
                self.trouble = "the broker speaks neither MQTT 5 nor 3.1.1"
            except _Down as err:
                self.trouble = str(err)
                protocol = MQTTProtocolVersion.MQTTv5
            finally:
                self._session = None
                session.close()
            if self._stopping.is_set():
                return
            if down_since is None:
                down_since = time.monotonic()
                log.warning(
                    "mqtt door closed (%s:%d): %s; trying again",
                    self._settings.host,
                    self._port,
                    self.trouble,
                )
            # Full jitter.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rng.uniform(0, backoff_s)):
                    await self._stopping.wait()
            backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)

    # --- what comes in (called by the session, in the loop) ---

    def take(self, topic: bytes, payload: bytes) -> None:
        place = self._topics.get(topic) or self._parse(topic)
        if place is None:
            return
        name, leaf = place
        if leaf == "state":
            self._states[name] = payload
            self._state_arrived.set()
            return
        now_s = time.monotonic()
        wait_s = self._intake.quotas.wait_s(name, now_s)
        if wait_s > 0:
            self._put_off(name, payload, wait_s, now_s)
            return
        for crowded_out in self._waiting.put(Arrival(name, payload, now_s)):
            self._turn_away(crowded_out.gateway, crowded_out.payload)
        self._arrived.set()

    def too_large(self) -> None:
        self._metrics.door_drops["oversize"] += 1

    def _parse(self, topic: bytes) -> tuple[str, str] | None:
        try:
            gateway, leaf = parse_topic(topic.decode())
        except (IdentityError, UnicodeDecodeError):
            self._metrics.door_drops["topic"] += 1
            return None
        if len(self._topics) >= MAX_TOPICS:
            self._topics.clear()
        place = self._topics[topic] = (str(gateway), leaf)
        return place

    def _put_off(self, name: str, payload: bytes, wait_s: float, now_s: float) -> None:
        """Over its quota. So many a second are answered, and one that heeds the first sends no second; the rest is let
        go: a flood must not cost an answer each. Their gateway has them all."""
        self._intake.quotas.refuse(name, now_s)
        self._metrics.batches[DOOR] += 1
        self._metrics.bytes[DOOR] += len(payload)
        if now_s - self._nacks_at_s >= 1.0:
            self._nacks_at_s = now_s
            self._nacks.clear()
        answered = self._nacks.get(name, 0)
        if answered >= NACKS_PER_S:
            self._metrics.door_drops["quota"] += 1
            return
        self._nacks[name] = answered + 1
        try:
            head, _ = open_head(payload)
        except WireError as err:
            self._metrics.refused[err.code] += 1
            nack = Nack(*claimed(payload), err.code, str(err))
        else:
            self._metrics.retry["quota"] += 1
            nack = over_quota(head, wait_s)
        self._answer([Verdict(name, nack)])

    def _turn_away(self, name: str, payload: bytes) -> None:
        """Answered at once: it must not wait behind what keeps intake busy."""
        self._metrics.batches[DOOR] += 1
        self._metrics.bytes[DOOR] += len(payload)
        try:
            head, _ = open_head(payload)
        except WireError as err:
            self._metrics.refused[err.code] += 1
            nack = Nack(*claimed(payload), err.code, str(err))
        else:
            self._metrics.retry["busy"] += 1
            nack = busy(head)
        self._answer([Verdict(name, nack)])

    # --- intake ---

    async def _drain(self) -> None:
        while True:
            while not self._waiting:
                if not self._busy:
                    self._idle.set()
                self._arrived.clear()
                await self._arrived.wait()
            self._idle.clear()
            self._busy += 1
            try:
                await self._answer_some()
            finally:
                self._busy -= 1

    async def _answer_some(self) -> None:
        """One group through intake."""
        group = self._waiting.take(GROUP)
        self._answer(await self._intake.accept(group, door=DOOR))

    def _answer(self, verdicts: list[Verdict]) -> None:
        session = self._session
        for gateway, replies in merge(verdicts).items():
            topic = f"{TOPIC_ROOT}/{gateway}/ack"
            for reply in replies:
                if session is None or not session.publish(topic, encode_reply(reply)):
                    self._metrics.replies_lost += 1

    async def _keep_states(self) -> None:
        while True:
            await self._state_arrived.wait()
            self._state_arrived.clear()
            states, self._states = self._states, {}
            for gateway, state in states.items():
                try:
                    await self._intake.on_state(gateway, state, door=DOOR)
                except StateError as err:
                    log.debug("heartbeat of %s refused: %s", gateway, err)
                except JournalError as err:
                    log.debug("heartbeat of %s not kept: %s", gateway, err)


class _Session:
    """One connection to the broker, from connect to loss. `lost` is done when it is over; `why` says why."""

    def __init__(
        self,
        door: MqttDoor,
        settings: config.cloud.MqttDoor,
        port: int,
        password: Secret,
        protocol: MQTTProtocolVersion,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._door = door
        self._settings = settings
        self._port = port
        self._protocol = protocol
        self._loop = loop
        self._fd = -1
        self._writing = False
        self._refusing = False
        self._looking = False
        self._misc: asyncio.Task[None] | None = None
        self._admitted: asyncio.Future[ReasonCode] = loop.create_future()
        self._subscribed: asyncio.Future[list[ReasonCode]] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.why = "connection lost"
        self._client = client = _Client(self._take, door.too_large, protocol)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.username_pw_set(settings.user, password.reveal())
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_disconnect = self._on_disconnect

    async def open(self) -> None:
        """Connect, log in, subscribe. Raises `_Down`."""
        settings = self._settings
        if settings.tls:
            try:
                self._client.tls_set_context(ssl.create_default_context(cafile=settings.ca_file))
            except (OSError, ssl.SSLError) as err:
                raise _Down(f"mqtt.ca_file {settings.ca_file}: {err}") from err
        properties = None
        if self._protocol == MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho's own gap
            properties.MaximumPacketSize = MAX_PACKET_BYTES
        try:
            await asyncio.to_thread(
                self._client.connect,
                settings.host,
                self._port,
                # paho gives up one keepalive after an unanswered ping, sent after one keepalive of silence.
                max(2, round(settings.keepalive_s * 0.75)),
                properties=properties,
            )
        except ssl.SSLError as err:
            raise _Down(f"TLS failed: {err}; check mqtt.ca_file and the broker's certificate") from err
        except (OSError, ValueError) as err:
            raise _Down(f"no connection: {err}") from err
        sock = self._client.socket()
        if sock is None:
            raise _Down("the broker closed the connection at once")
        # A reply never waits for the broker to acknowledge the one before it.
        if isinstance(sock, socket.socket):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fd = sock.fileno()
        self._client.on_socket_close = self._on_socket_close
        self._loop.add_reader(self._fd, self._readable)
        self._misc = self._loop.create_task(self._keep_alive(), name="mqtt-keepalive")
        reason = await self._word(self._admitted, "an answer to CONNECT")
        if reason.is_failure:
            if str(reason) == "Unsupported protocol version":
                raise _OnlyOldProtocol(str(reason))
            raise _Down(f"login refused: {reason}; check mqtt.user and its password")
        topics = [(f"{TOPIC_ROOT}/+/+/{leaf}", 0) for leaf in ("up", "state")]
        self._client.subscribe(topics)
        self._flush()
        codes = await self._word(self._subscribed, "an answer to SUBSCRIBE")
        for (topic, _), code in zip(topics, codes, strict=False):
            if code.is_failure:
                raise _Down(
                    f"the broker refuses to let {settings.user!r} read {topic}: {code}; change its access list"
                )

    async def _word(self, future: asyncio.Future[T], what: str) -> T:
        await asyncio.wait(
            (future, self.lost), timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if future.done():
            return future.result()
        if not self.lost.done():
            raise _Down(f"{what} did not come within {CONNECT_TIMEOUT_S:g} s")
        if future is self._admitted and self._protocol == MQTTProtocolVersion.MQTTv5:
            raise _OnlyOldProtocol(
                "closed without an answer to CONNECT"
            )  # what some brokers say to version 5
        raise _Down(f"closed before {what}: {self.why}")

    def refuse_more(self) -> None:
        """Take no batch any more; replies still go out."""
        self._refusing = True

    def close(self) -> None:
        """Say goodbye if possible, and let go of everything. Safe to call twice."""
        if self._misc is not None:
            self._misc.cancel()
            self._misc = None
        self._client.disconnect()
        self._unwatch()
        self._over("closed by us")

    def publish(self, topic: str, payload: bytes) -> bool:
        """Whether the connection took it."""
        if self.lost.done():
            return False
        info = self._client.publish(topic, payload, qos=0)
        self._flush()
        return info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    # --- driving paho from the loop ---

    def _readable(self) -> None:
        try:
            more = self._client.receive()
        except _Down as err:
            self._over(str(err))
            return
        if more:  # what TLS holds already, no poll would tell of
            self._loop.call_soon(self._again)
        self._flush()

    def _again(self) -> None:
        if not self.lost.done():
            self._readable()

    def _flush(self) -> None:
        if self._client.want_write() and not self._writing and self._fd >= 0:
            self._writing = True
            self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        code = self._client.loop_write()
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._over(paho.error_string(code))
        elif not self._client.want_write() and self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)

    async def _keep_alive(self) -> None:
        while not self.lost.done():
            await asyncio.sleep(MISC_S)
            self._looking = True  # whatever ends in here is ended by us
            code = self._client.loop_misc()
            self._looking = False
            self._flush()
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._over(_SILENT)

    def _unwatch(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            if self._writing:
                self._loop.remove_writer(self._fd)
            self._fd, self._writing = -1, False

    def _over(self, why: str) -> None:
        self._unwatch()
        if not self.lost.done():
            self.why = why
            self.lost.set_result(None)

    # --- paho's callbacks; all run in the loop's thread but `_on_socket_close` during a failed connect ---

    def _on_connect(
        self, client: paho.Client, userdata: object, flags: object, reason: ReasonCode, properties: object
    ) -> None:
        if not self._admitted.done():
            self._admitted.set_result(reason)

    def _on_subscribe(
        self, client: paho.Client, userdata: object, mid: int, codes: list[ReasonCode], properties: object
    ) -> None:
        if not self._subscribed.done():
            self._subscribed.set_result(codes)

    def _on_message(self, client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        self._take(message.topic.encode(), bytes(message.payload))

    def _take(self, topic: bytes, payload: bytes) -> None:
        if not self._refusing:
            self._door.take(topic, payload)

    def _on_disconnect(
        self, client: paho.Client, userdata: object, flags: object, reason: ReasonCode, properties: object
    ) -> None:
        self._over(_SILENT if self._looking else f"the broker closed the connection: {reason}")

    def _on_socket_close(self, client: paho.Client, userdata: object, sock: object) -> None:
        self._unwatch()
