"""Makes the sink that the settings name."""

from outrider_runtime.health import Health

from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import SinkSettings
from outrider_operator.sinks.base import RunnableSink
from outrider_operator.sinks.files import FileSink
from outrider_operator.sinks.kafka import KafkaSink


def make_sink(settings: SinkSettings, metrics: ServerMetrics, health: Health) -> RunnableSink:
    """The sink of `sink.kind`; its `run` must be running for batches to be stored.

    Raises:
        SettingsError: its settings cannot be used.
    """
    if settings.kind == "kafka":
        return KafkaSink(settings.kafka, metrics, health)
    return FileSink(settings.file, metrics, health)
