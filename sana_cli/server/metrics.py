"""What the server counts, in Prometheus' text format."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.process_collector import ProcessCollector

from sana_cli.pipeline.events import Event, ImageDone, Progress
from sana_cli.server.gallery import Gallery
from sana_cli.server.jobs import JobQueue
from sana_cli.session import Session

PARTS = ("text_encoder", "transformer", "encoder", "decoder")


class Metrics:
    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "sana_requests", "Requests.", ("method", "path", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "sana_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("path",),
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            registry=registry,
        )
        self.sent_bytes = Counter("sana_sent_bytes", "Bytes of answers.", registry=registry)
        self.received_bytes = Counter(
            "sana_received_bytes", "Bytes of the bodies of requests.", registry=registry
        )
        self.stage_seconds = Counter(
            "sana_stage_seconds", "Seconds of drawing.", ("stage",), registry=registry
        )
        self.images = Counter("sana_images", "Images drawn.", registry=registry)
        self.jobs = Counter("sana_jobs", "Jobs that are over.", ("state",), registry=registry)
        self.waiting = Gauge("sana_queue_waiting", "Jobs in the queue.", registry=registry)
        self.room = Gauge("sana_queue_limit", "Jobs that the queue takes.", registry=registry)
        self.drawing = Gauge("sana_drawing", "Jobs that are being drawn.", registry=registry)
        self.loaded = Gauge(
            "sana_loaded_networks", "Networks in memory.", ("part",), registry=registry
        )
        self.loaded_bytes = Gauge(
            "sana_loaded_bytes", "Bytes of the networks in memory.", registry=registry
        )
        self.gallery_bytes = Gauge(
            "sana_gallery_bytes", "Bytes of the images in memory.", registry=registry
        )

    def watch(self, event: Event) -> None:
        """Count an event of drawing."""
        if isinstance(event, Progress):
            self.stage_seconds.labels(event.stage).inc(event.seconds)
        elif isinstance(event, ImageDone):
            self.images.inc()

    def text(self, session: Session, queue: JobQueue, gallery: Gallery) -> bytes:
        """All counts, with those that are looked up as of now."""
        self.waiting.set(len(queue.waiting))
        self.room.set(queue.most_waiting)
        self.drawing.set(int(queue.current is not None))
        loaded = [key.part for key in session.networks.loaded]
        for part in PARTS:
            self.loaded.labels(part).set(loaded.count(part))
        self.loaded_bytes.set(session.networks.held_bytes)
        self.gallery_bytes.set(gallery.nbytes)
        return generate_latest(self.registry)
