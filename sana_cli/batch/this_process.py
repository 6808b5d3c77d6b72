"""The engine of one device: the jobs are drawn in the process and the session of the command."""

from collections.abc import Iterator

from sana_cli.batch.engine import Failed, RunEvent, Work
from sana_cli.batch.jobs import Job
from sana_cli.batch.recorder import Recorder
from sana_cli.batch.worker import Encoded, Worker, need_the_same


class ThisProcess:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.worker = Worker(work.session, work.options, work.stopping)

    def run(self, jobs: list[Job]) -> Iterator[RunEvent]:
        recorder = Recorder(self.work.manifest, self.work.options.force)
        work, alike = self.work, need_the_same(jobs)
        for event in self.worker.run(jobs, work.files_of, work.inputs, alike):
            if isinstance(event, Encoded):
                yield recorder.save(event)
            elif isinstance(event, Failed):
                yield recorder.fail(event.job, event.error)
            else:
                yield event

    def close(self) -> None:
        """Keep the session, which is the command's."""
