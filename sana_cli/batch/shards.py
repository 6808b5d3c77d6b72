"""Shards of a batch for independent machines, by the hash in a job's id."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sana_cli.errors import UsageError

MAX_SHARDS = 100_000

# Schedulers: the variables of a task's number, the count of tasks, and the first task's number.
SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", None),
    ("DSTACK_NODE_RANK", "DSTACK_NODES_NUM", None),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE", None),
    ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT", None),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
    ("RANK", "WORLD_SIZE", None),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", None),
)


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `count`, from 1."""

    number: int
    count: int

    def holds(self, id: str) -> bool:
        """Whether an id of hexadecimal digits is in this shard; every id is in exactly one."""
        return int(id, 16) % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """Parse `2/3`, or `auto`, which reads a scheduler's variables."""
    if text == "auto":
        return _scheduled(environment)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= MAX_SHARDS:
        raise UsageError(f"--shard {text!r} is not a shard", "use 1/3, 2/3 and 3/3, or auto")
    return Shard(int(match[1]), int(match[2]))


def _scheduled(environment: Mapping[str, str]) -> Shard:
    for index, count, least in SCHEDULERS:
        if index not in environment or count not in environment:
            continue
        try:
            first = int(environment.get(least, "0")) if least else 0
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1")) if least else 1
            at, rest = divmod(int(environment[index]) - first, step)
            shard = Shard(at + 1, int(environment[count]))
        except (ValueError, ZeroDivisionError):
            shard, rest = Shard(0, 0), 0
        if rest or not 1 <= shard.number <= shard.count <= MAX_SHARDS:
            values = f"{index}={environment[index]}, {count}={environment[count]}"
            raise UsageError(f"--shard auto: {values} are not a task and a count")
        return shard
    if "JOB_COMPLETION_INDEX" in environment:
        raise UsageError(
            "--shard auto: Kubernetes does not tell a job how many completions there are",
            'use --shard "$((JOB_COMPLETION_INDEX + 1))/N"',
        )
    known = ", ".join(index for index, _, _ in SCHEDULERS)
    raise UsageError("--shard auto: no scheduler has numbered this task", f"it sets one of {known}")
