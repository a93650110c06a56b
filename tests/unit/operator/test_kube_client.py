"""The connection to the API server: what becomes of a request when there is none."""

import pytest
from kubernetes.aio.client import Configuration
from outrider_operator.core.identity import ReviewUnavailableError
from outrider_operator.core.ports import ClusterUnavailableError
from outrider_operator.kube.client import KubeClient
from outrider_operator.kube.tokens import reviewer


async def test_a_token_that_comes_after_the_close_is_not_reviewed_but_may_come_again() -> None:
    """The gateway drains, and is asked for streams, after the connection was closed."""
    config = Configuration()
    config.host, config.retries = "http://127.0.0.1:1", False
    kube = KubeClient(config, 5.0)
    with pytest.raises(ClusterUnavailableError):
        await kube.request("GET", "/version")
    await kube.close()
    with pytest.raises(ReviewUnavailableError):
        await reviewer(kube)("token", "outrider")
