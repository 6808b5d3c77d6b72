"""Encoded images to files and lines of the manifest: each file is listed before it is written."""

import hashlib
import time

from sana_cli.batch.engine import Failed, Saved
from sana_cli.batch.jobs import Job
from sana_cli.batch.manifest import Manifest
from sana_cli.batch.worker import Encoded
from sana_cli.errors import DiskFull, SanaError
from sana_cli.images.files import write


class Recorder:
    def __init__(self, manifest: Manifest, force: bool) -> None:
        """With `force`, files that others wrote are replaced."""
        self.manifest, self.force = manifest, force
        self.before = time.perf_counter()  # when the last image was saved

    def save(self, image: Encoded) -> Saved | Failed:
        """Write an image and its lines. SanaError if the disk is full or the manifest cannot be
        written; any other error is the job's failure."""
        job, data = image.job, image.data
        path, replaces = self.manifest.place(job.id, job.name, self.force)
        now = time.perf_counter()
        facts = {
            "id": job.id,
            "row": job.row,
            "seed": job.recipe.seed,
            "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": round(now - self.before, 3),
            "peak_bytes": image.peak_bytes,
        }
        self.before = now
        self.manifest.append(status="writing", path=path.as_posix(), **facts)
        try:
            target = self.manifest.folder / path
            written = write(target, data, replaces, f"-{self.manifest.stem}")
        except DiskFull:
            raise
        except SanaError as error:
            return self.fail(job, error)
        line = self.manifest.done(written.relative_to(self.manifest.folder), **facts)
        return Saved(job, written, line)

    def fail(self, job: Job, error: SanaError) -> Failed:
        """Record a failure. SanaError if the manifest cannot be written."""
        facts = {"id": job.id, "row": job.row, "seed": job.recipe.seed}
        self.manifest.append(
            status="failed", **facts, error=error.message, exit_code=error.exit_code
        )
        return Failed(job, error)
