"""An API server's exec, as far as kubectl uses it: commands run as processes of this machine.

Speaks the channels of v5.channel.k8s.io over a WebSocket: 1 stdout, 2 stderr, 3 how it ended.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

STDOUT, STDERR, ERROR = b"\x01", b"\x02", b"\x03"


class ExecServer:
    """Serves a list of Pods, each with its own environment, and other objects as they are set.

    Args:
        pods: environment of the commands, by name of the Pod.
        objects: answers to GET, by path.
    """

    def __init__(
        self, pods: Mapping[str, Mapping[str, str]], objects: Mapping[str, Any] | None = None
    ) -> None:
        self.pods = dict(pods)
        self.objects = dict(objects or {})
        #: Pods whose connection breaks off after the first data, and those that refuse.
        self.breaking: set[str] = set()
        self.refusing: set[str] = set()
        #: Which commands ran, by Pod.
        self.ran: list[tuple[str, list[str]]] = []
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve on loopback; gives the URL."""
        application = web.Application()
        application.router.add_get("/api/v1/namespaces/{namespace}/pods", self._list)
        application.router.add_get("/api/v1/namespaces/{namespace}/pods/{pod}/exec", self._exec)
        application.router.add_get("/{path:.*}", self._get)
        runner = web.AppRunner(application, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            await runner.cleanup()

    async def _get(self, request: web.Request) -> web.Response:
        found = self.objects.get(request.path)
        if found is None:
            return web.json_response({"message": f"{request.path} not found"}, status=404)
        return web.json_response(found)

    async def _list(self, request: web.Request) -> web.Response:
        assert "component=server" in request.query["labelSelector"]
        items = [{"metadata": {"name": n}, "status": {"phase": "Running"}} for n in self.pods]
        return web.json_response({"items": items})

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        pod, command = request.match_info["pod"], request.query.getall("command")
        if pod in self.refusing:
            return web.json_response({"message": "pods is forbidden"}, status=403)
        assert request.query["container"] == "server"
        self.ran.append((pod, command))
        socket = web.WebSocketResponse(protocols=["v5.channel.k8s.io"])
        await socket.prepare(request)
        process = await asyncio.create_subprocess_exec(
            *command,
            env=dict(self.pods[pod]),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        sending = [
            asyncio.create_task(self._send(socket, pod, STDOUT, process.stdout)),
            asyncio.create_task(self._send(socket, pod, STDERR, process.stderr)),
        ]
        listening = asyncio.create_task(socket.receive())
        try:
            left = set(sending)
            while left and not listening.done():
                done, _ = await asyncio.wait(
                    {*left, listening}, return_when=asyncio.FIRST_COMPLETED
                )
                left -= done
                if not all(task.result() for task in done - {listening}):
                    break
            if left:
                await socket.close()
                return socket
            await process.wait()
        finally:
            # As where the one who asked has gone: nobody reads what it prints.
            if process.returncode is None:
                process.kill()
                await process.wait()
            for task in (*sending, listening):
                task.cancel()
        await socket.send_bytes(ERROR + json.dumps(_status(process.returncode or 0)).encode())
        await socket.close()
        return socket

    async def _send(
        self, socket: web.WebSocketResponse, pod: str, channel: bytes, stream: Any
    ) -> bool:
        """Hand on what a command prints, as a kubelet does: at once, wherever that ends."""
        while data := await stream.read(10_000):
            try:
                await socket.send_bytes(channel + data)
            except ConnectionError:
                return False
            if pod in self.breaking:
                return False
        return True


def _status(code: int) -> dict[str, Any]:
    if code == 0:
        return {"status": "Success"}
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return {
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "details": {"causes": causes},
    }
