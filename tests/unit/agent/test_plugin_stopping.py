"""Whoever waits for plug-ins waits for a bounded time, and no two change them at once."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fakes.plugin_bench import plugins_in
from outrider_agent.plugins.manager import PluginError
from outrider_agent.plugins.packages import Packages


async def test_the_end_waits_for_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def hang(*_: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with plugins_in(tmp_path) as bench:
        await bench.apply(bench.plugin("emit 1"))
        monkeypatch.setattr(Packages, "have", hang)
        preparing = asyncio.create_task(bench.plugins.prepare([bench.plugin("emit 2")]))
        await begun.wait()
        async with asyncio.timeout(10):
            bench.stop.set()
            # No cancellation: whoever waits for it would take it for its own.
            with pytest.raises(PluginError, match="the agent stops"):
                await preparing
        await bench.until(lambda: not bench.processes())
        with pytest.raises(PluginError, match="the agent stops"):
            await bench.plugins.prepare([bench.plugin("emit 2")])


async def test_a_preparation_that_is_cancelled_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def hang(*_: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with plugins_in(tmp_path) as bench:
        monkeypatch.setattr(Packages, "have", hang)
        preparing = asyncio.create_task(bench.plugins.prepare([bench.plugin("emit 2")]))
        await begun.wait()
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing


async def test_a_switch_that_nobody_waits_for_any_more_is_still_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with plugins_in(tmp_path) as bench:
        first = bench.plugin("emit 1")
        await bench.apply(first)
        await bench.until(lambda: bench.state().healthy)
        order: list[str] = []
        replace = bench.plugins._replace
        slow = asyncio.Event()

        async def watched(*given: Any) -> None:
            order.append("begun")
            await slow.wait()
            await replace(*given)
            order.append("ended")

        monkeypatch.setattr(bench.plugins, "_replace", watched)
        prepared = await bench.plugins.prepare([bench.plugin("emit 2")])
        switching = asyncio.create_task(bench.plugins.switch(prepared))
        await bench.until(lambda: order == ["begun"])
        switching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await switching
        again = asyncio.create_task(bench.apply(first))
        done, _ = await asyncio.wait({again}, timeout=0.2)
        assert not done
        assert order == ["begun"]
        slow.set()
        await again
        assert order == ["begun", "ended"] * 2
        await bench.until(lambda: bench.state().healthy)
        assert len(bench.processes()) == 1


async def test_a_plugin_whose_package_is_had_again_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def hang(*_: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with plugins_in(tmp_path) as bench:
        await bench.apply(bench.plugin("emit 1"))
        await bench.until(lambda: bench.state().healthy)
        with monkeypatch.context() as patch:
            patch.setattr(Packages, "again", hang)
            bench.plugins._runners["wire"].package.executable.unlink()
            os.kill(bench.pid(), signal.SIGKILL)
            await begun.wait()
            async with asyncio.timeout(10):
                await bench.apply()
        assert bench.plugins.states() == []
