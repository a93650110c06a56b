"""The stream's call in bytes: what is sent is serialized once, what comes is parsed once.

The generated stub serializes by itself, where its size cannot be seen without doing it again. Makes
the call and its messages; decides nothing.
"""

from collections.abc import Sequence

import grpc.aio
from outrider_proto.channel import bearer
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.storage import Waiting

#: The agent's stream.
Call = grpc.aio.StreamStreamCall[bytes, bytes]

_METHOD = pb.DESCRIPTOR.services_by_name["AgentService"].methods_by_name["Transfer"]
_PATH = f"/{_METHOD.containing_service.full_name}/{_METHOD.name}"


def open_transfer(channel: grpc.aio.Channel, token: str) -> Call:
    """Begin the agent's stream."""
    method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_PATH)
    return method(metadata=bearer(token))


def of_batches(items: Sequence[Waiting]) -> bytes:
    """A message of batches."""
    return pb.PackagedData(batches=[item.batch for item in items]).SerializeToString()
