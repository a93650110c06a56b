"""Which Kafka producer the server uses: cost, latency and behaviour under faults of three.

Each case is a process of its own against one real broker on loopback, and one JSON line. It uses no
code of the server, so that it still says what the choice was made by. `make bench-producers`.

none: no producer, which is what the measuring itself costs. aiokafka: AIOKafkaProducer. callbacks:
confluent-kafka's Producer, whose delivery callbacks run in `poll(0)` on the event loop. aio:
confluent-kafka's AIOProducer, which takes no headers.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

VALUE_BYTES = 8192
HEADERS: list[Any] = [(f"outrider-header-{n}", b"0123456789abcdef") for n in range(10)]
#: Messages under way at once in the throughput cases.
WINDOW = 2000
#: Messages a second in the latency cases, and how many.
RATE, TIMED = 200, 2000
#: How long a broker is frozen or dead, seconds.
FAULT_SECONDS = 8.0
POLL_SECONDS = 0.004
MAX_MESSAGE = 4 * 1024 * 1024 + 65536
PRODUCERS = ("none", "aiokafka", "callbacks", "aio")


class Producer(Protocol):
    async def open(self) -> None: ...
    def send(self, key: bytes, value: bytes) -> "asyncio.Future[Any]": ...
    async def close(self) -> None: ...


class Nothing:
    def __init__(self, _bootstrap: str, _topic: str) -> None:
        self._loop = asyncio.get_running_loop()

    async def open(self) -> None: ...

    def send(self, key: bytes, value: bytes) -> "asyncio.Future[Any]":
        future: asyncio.Future[Any] = self._loop.create_future()
        self._loop.call_soon(future.set_result, None)
        return future

    async def close(self) -> None: ...


class WithAiokafka:
    def __init__(self, bootstrap: str, topic: str) -> None:
        from aiokafka import AIOKafkaProducer

        self._topic = topic
        self._producer = AIOKafkaProducer(
            bootstrap_servers=bootstrap,
            acks="all",
            enable_idempotence=True,
            compression_type=None,
            max_request_size=MAX_MESSAGE,
            max_batch_size=512 * 1024,
            linger_ms=5,
            request_timeout_ms=5000,
        )

    async def open(self) -> None:
        await self._producer.start()
        await self._producer.partitions_for(self._topic)

    def send(self, key: bytes, value: bytes) -> "asyncio.Future[Any]":
        # `send` is a coroutine: a task for each message, as whoever may not wait has to.
        sent: asyncio.Future[Any] = asyncio.ensure_future(
            self._producer.send_and_wait(self._topic, value, key=key, headers=HEADERS)
        )
        return sent

    async def close(self) -> None:
        await self._producer.stop()


def confluent_config(bootstrap: str) -> dict[str, Any]:
    return {
        "bootstrap.servers": bootstrap,
        "acks": "all",
        "enable.idempotence": True,
        "compression.type": "none",
        "message.max.bytes": MAX_MESSAGE,
        "linger.ms": 5,
        "partitioner": "murmur2_random",
        "socket.timeout.ms": 5000,
        "message.timeout.ms": 10_000,
        "queue.buffering.max.kbytes": 256 * 1024,
        "log_level": 2,
    }


class WithCallbacks:
    def __init__(self, bootstrap: str, topic: str) -> None:
        from confluent_kafka import KafkaException
        from confluent_kafka import Producer as Plain

        self._topic, self._error = topic, KafkaException
        self._producer = Plain(confluent_config(bootstrap))
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        await asyncio.to_thread(self._producer.list_topics, self._topic, 10)

    def send(self, key: bytes, value: bytes) -> "asyncio.Future[Any]":
        future: asyncio.Future[Any] = self._loop.create_future()

        def delivered(error: Any, _message: Any) -> None:
            if not future.done():
                future.set_exception(self._error(error)) if error else future.set_result(None)

        self._producer.produce(self._topic, value, key=key, headers=HEADERS, on_delivery=delivered)
        if self._timer is None:
            self._timer = self._loop.call_later(POLL_SECONDS, self._poll)
        return future

    def _poll(self) -> None:
        self._producer.poll(0)
        self._timer = None
        if len(self._producer):
            self._timer = self._loop.call_later(POLL_SECONDS, self._poll)

    async def close(self) -> None:
        await asyncio.to_thread(self._producer.flush, 10)


class WithAio:
    """Without headers: it refuses them, so that it could only be used with them in the value."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        from confluent_kafka.aio import AIOProducer

        self._topic = topic
        self._producer: Any = AIOProducer(
            confluent_config(bootstrap), batch_size=100, buffer_timeout=0.01
        )

    async def open(self) -> None:
        await self._producer.list_topics(self._topic, 10)

    def send(self, key: bytes, value: bytes) -> "asyncio.Future[Any]":
        async def produce() -> None:
            await (await self._producer.produce(self._topic, value, key))

        return asyncio.ensure_future(produce())

    async def close(self) -> None:
        await self._producer.close()


MAKE: dict[str, Callable[[str, str], Producer]] = {
    "none": Nothing,
    "aiokafka": WithAiokafka,
    "callbacks": WithCallbacks,
    "aio": WithAio,
}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def throughput(producer: Producer, keys: int, messages: int) -> dict[str, Any]:
    values = [os.urandom(VALUE_BYTES) for _ in range(64)]
    names = [f"6f1c2a34-agent-{n}".encode() for n in range(keys)]
    room = asyncio.Semaphore(WINDOW)
    failed: Counter[str] = Counter()

    def ended(future: "asyncio.Future[Any]") -> None:
        room.release()
        if error := future.exception():
            failed[type(error).__name__] += 1

    cpu, began = cpu_seconds(), time.monotonic()
    for number in range(messages):
        await room.acquire()
        value = values[number % 64]
        producer.send(names[number % keys], value).add_done_callback(ended)
        if number % 20 == 0:
            await asyncio.sleep(0)
    for _ in range(WINDOW):
        await room.acquire()
    cpu, took = cpu_seconds() - cpu, time.monotonic() - began
    return {
        "cpu_micros_per_message": round(cpu / messages * 1e6, 1),
        "messages_per_cpu_second": round(messages / cpu),
        "messages_per_second": round(messages / took),
        "failed": dict(failed),
    }


async def latency(producer: Producer, keys: int, _messages: int) -> dict[str, Any]:
    value, times = os.urandom(VALUE_BYTES), list[float]()

    async def one(number: int) -> None:
        began = time.monotonic()
        await producer.send(f"agent-{number % keys}".encode(), value)
        times.append(time.monotonic() - began)

    cpu = cpu_seconds()
    async with asyncio.TaskGroup() as group:
        for number in range(TIMED):
            group.create_task(one(number))
            await asyncio.sleep(1 / RATE)
    times.sort()
    return {
        "p50_millis": round(times[len(times) // 2] * 1000, 1),
        "p99_millis": round(times[len(times) * 99 // 100] * 1000, 1),
        "cpu_micros_per_message": round((cpu_seconds() - cpu) / TIMED * 1e6, 1),
    }


async def fault(producer: Producer, _keys: int, _messages: int) -> dict[str, Any]:
    """Load goes on through a fault that the parent makes when told; reads its word on stdin."""
    value, stop = os.urandom(VALUE_BYTES), asyncio.Event()
    stored, errors = list[float](), Counter[str]()

    async def agent(number: int) -> None:
        while not stop.is_set():
            try:
                await producer.send(f"agent-{number}".encode(), value)
                stored.append(time.monotonic())
            except Exception as error:  # noqa: BLE001 - each library has its own
                errors[f"{type(error).__name__}: {error}"[:80]] += 1
                await asyncio.sleep(0.1)

    agents = [asyncio.create_task(agent(n)) for n in range(50)]
    while len(stored) < 500:  # noqa: ASYNC110 - a look now and then will do
        await asyncio.sleep(0.05)
    print("loaded", flush=True)
    told = [await asyncio.to_thread(sys.stdin.readline) for _ in range(1)]
    broken = time.monotonic()
    cpu = cpu_seconds()
    told += [await asyncio.to_thread(sys.stdin.readline) for _ in range(1)]
    back = time.monotonic()
    spent = cpu_seconds() - cpu
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(40):
            while not any(moment > back for moment in stored):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
    first = next((moment for moment in stored if moment > back), None)
    stop.set()
    await asyncio.wait(agents, timeout=15)
    return {
        "stored_while_away": sum(broken + 1 < moment < back for moment in stored),
        "seconds_until_stored_again": None if first is None else round(first - back, 2),
        "cpu_percent_while_away": round(spent / (back - broken) * 100, 1),
        "errors": dict(errors),
    }


CASES = {"throughput": throughput, "latency": latency, "freeze": fault, "kill": fault}


async def run_case(options: argparse.Namespace) -> None:
    producer = MAKE[options.producer](options.bootstrap, options.topic)
    await producer.open()
    # It waits for an idempotent producer's number, which is no matter later.
    await producer.send(b"first", b"value")
    found = await CASES[options.case](producer, options.keys, options.messages)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(15):
            await producer.close()
    line = {"producer": options.producer, "case": options.case, "keys": options.keys, **found}
    print(json.dumps({**line, "peak_rss_mib": round(peak_mib())}), flush=True)
    os._exit(0)  # whatever a producer that was never made well still holds


def start(options: argparse.Namespace, bootstrap: str, **case: Any) -> "subprocess.Popen[str]":
    arguments = [f"--{name}={value}" for name, value in case.items()]
    command = [sys.executable, "-m", "kafka_producers", f"--bootstrap={bootstrap}", *arguments]
    command += [f"--messages={options.messages}"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else subprocess.DEVNULL,
        text=True,
    )


def make_topic(admin: Any, name: str) -> None:
    """A broker that was frozen makes none until it is let in again."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import NewTopic

    topic = NewTopic(name, 12, 1, config={"retention.bytes": str(2**26)})
    for _ in range(60):
        try:
            admin.create_topics([topic])[name].result(30)
            return
        except KafkaException:
            time.sleep(0.5)
    raise SystemExit(f"the topic {name} cannot be made")


def main(options: argparse.Namespace) -> None:
    from cluster.kafka import KafkaBroker
    from confluent_kafka.admin import AdminClient

    with KafkaBroker(folder=None) as broker:
        admin = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})
        numbers = itertools.count()
        producers = options.producer.split(",") if options.producer else PRODUCERS

        def run(producer: str, case: str, keys: int) -> None:
            topic = f"bench-{next(numbers)}"
            make_topic(admin, topic)
            child = start(
                options, broker.bootstrap, producer=producer, case=case, keys=keys, topic=topic
            )
            assert child.stdin is not None
            assert child.stdout is not None
            if case in ("freeze", "kill"):
                child.stdout.readline()
                broker.freeze() if case == "freeze" else broker.kill()
                print("away", file=child.stdin, flush=True)
                time.sleep(FAULT_SECONDS)
                broker.thaw() if case == "freeze" else broker.resume()
                print("back", file=child.stdin, flush=True)
            print(child.stdout.readline().strip(), flush=True)
            child.wait()
            admin.delete_topics([topic])[topic].result(30)

        for producer in producers:
            for keys in (10, 100, 1000):
                run(producer, "throughput", keys)
            if producer == "none":
                continue
            run(producer, "latency", 100)
            run(producer, "freeze", 50)
            run(producer, "kill", 50)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--producer", default="", help="one of them, or several with commas")
    parser.add_argument("--verbose", action="store_true", help="show what the producers log")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--keys", type=int, default=100, help=argparse.SUPPRESS)
    parser.add_argument("--bootstrap", default="", help=argparse.SUPPRESS)
    parser.add_argument("--topic", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    parsed = parse()
    if parsed.case:
        asyncio.run(run_case(parsed))
    else:
        main(parsed)
