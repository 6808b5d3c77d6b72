"""Retries after running out of memory: release idle networks, then use a smaller plan."""

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from sana_cli.errors import NotEnoughMemory
from sana_cli.pipeline.events import Notice
from sana_cli.pipeline.plan import Plan
from sana_cli.system.devices import is_out_of_memory, release_unused_memory

Result = TypeVar("Result")


class OOMRetry:
    """The plans of one stage, from the chosen one to those that need less and less memory."""

    def __init__(
        self, plans: Iterator[Plan], what: str, release_idle: Callable[[], bool] = lambda: False
    ) -> None:
        """`what` names the work in messages; `release_idle` frees networks that are not in use."""
        self.plans, self.plan, self.what = plans, next(plans), what
        self.release_idle = release_idle

    def attempt(self, work: Callable[[Plan], Result]) -> Generator[Notice, None, Result]:
        """Return the result of `work` with the first plan that does not run out of memory.

        NotEnoughMemory if no plan is left.
        """
        while True:
            try:
                return work(self.plan)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            if self.release_idle():
                yield Notice(f"{self.what}: out of memory; retrying without the idle networks")
                continue
            release_unused_memory(self.plan.device)  # the failed attempt's tensors are free by now
            before, smaller = self.plan, next(self.plans, None)
            if smaller is None:
                raise NotEnoughMemory(
                    f"{self.what}: not enough memory, even in the smallest pieces",
                    "ask for fewer pixels, or use --device cpu",
                )
            self.plan = smaller
            change = smaller.difference(before)
            yield Notice(f"{self.what}: out of memory; retrying {change}", warning=True)
