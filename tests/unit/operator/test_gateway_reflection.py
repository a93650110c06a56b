"""Reflection: a client without our .proto files can ask what there is, if it may call at all."""

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fakes.gateway import running_gateway
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from outrider_proto.channel import bearer


async def services(channel: Any, token: str) -> set[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(metadata=bearer(token) if token else ())
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    await call.done_writing()
    if answer is grpc.aio.EOF:
        raise AssertionError(await call.code())
    return {service.name for service in answer.list_services_response.service}


async def test_lists_the_services_for_those_who_may_call(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as running, running.connect() as channel:
        for token in (running.reviews.agent("node-1"), running.reviews.server()):
            assert await services(channel, token) >= {
                "outrider.v1.AgentService",
                "outrider.v1.FleetService",
                "grpc.health.v1.Health",
            }
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await services(channel, "")
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
