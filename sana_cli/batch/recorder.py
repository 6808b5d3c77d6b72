"""Encoded images to files and lines of the manifest: each file is listed before it is written."""

import hashlib
import time
from typing import Any

from sana_cli.batch.engine import Failed, Saved
from sana_cli.batch.jobs import Job
from sana_cli.batch.lines import Line
from sana_cli.batch.manifest import Manifest
from sana_cli.batch.worker import Encoded
from sana_cli.errors import DiskFull, SanaError


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
        sha256 = hashlib.sha256(data).hexdigest()
        facts = self._facts(job, sha256=sha256, peak_bytes=image.peak_bytes)
        self.manifest.append(status="writing", path=path.as_posix(), **facts)
        try:
            store, mark = self.manifest.store, self.manifest.stem
            written = store.write(path.as_posix(), data, replaces, mark)
        except DiskFull:
            raise
        except SanaError as error:
            return self.fail(job, error)
        line = self.manifest.done(written, **facts)
        return Saved(job, store.locate(written), line)

    def adopt(self, job: Job, written: Line) -> Saved:
        """Record an image that another process has written, with the facts of `written`: path,
        sha256, peak_bytes and the store's state."""
        line = {"status": "done", **self._facts(job, **written)}
        self.manifest.append(**line)
        return Saved(job, self.manifest.store.locate(line["path"]), line)

    def _facts(self, job: Job, **more: Any) -> Line:
        now = time.perf_counter()
        seconds, self.before = round(now - self.before, 3), now
        return {"id": job.id, "row": job.row, "seed": job.recipe.seed, "seconds": seconds, **more}

    def fail(self, job: Job, error: SanaError) -> Failed:
        """Record a failure. SanaError if the manifest cannot be written."""
        facts = {"id": job.id, "row": job.row, "seed": job.recipe.seed}
        self.manifest.append(
            status="failed", **facts, error=error.message, exit_code=error.exit_code
        )
        return Failed(job, error)
