"""Rows to jobs: one image each, identified by what it draws and not by the position of its row.

A job's id is a hash of its recipe, the requested precision (not the resolved one, so that all
machines agree), the row's `output` and the columns used in the name, and the number of equal jobs
before it. Where no seed is given, the seed is a hash of the same without the precision, and equal
jobs get consecutive seeds. So a job has the same id, seed and image alone or in any batch, in any
order and any shard.
"""

import hashlib
import json
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_cli.batch.rows import Fault, Row, RowOrFault
from sana_cli.batch.templates import alternatives, columns_of, fill
from sana_cli.errors import SanaError, UsageError
from sana_cli.images.names import Output, check_size, parse_job_name
from sana_cli.recipe import MAX_IMAGES, PRECISION, SEED_LIMIT, Recipe, parse_seeds
from sana_cli.resolve import Inputs, Resolution, resolve
from sana_cli.settings import Settings
from sana_cli.weights.catalogue import Component, Model

if TYPE_CHECKING:
    from sana_cli.weights.model_files import ModelFiles

ID_DIGITS = 16  # of 64: a hundred thousand jobs share one with a chance of 3 in 10 billion


@dataclass(frozen=True)
class Job:
    id: str
    row: int
    recipe: Recipe
    resolution: Resolution  # which recipe and files follow from
    name: Path  # inside the folder of the batch
    format: str

    @property
    def components(self) -> tuple[Model, Component | None, Component | None]:
        """What decides the files of the model."""
        return self.resolution.model, self.resolution.vae, self.resolution.controlnet


@dataclass(frozen=True)
class JobSpec:
    """A prompt of a row with its resolved settings, before any file of the model is read."""

    row: Row
    resolution: Resolution
    seeds: list[int] | None  # None: `count` seeds from a hash
    count: int
    output: Output
    columns: dict[str, str]  # part of the id: columns in the name, and `output`


class RowReader:
    """Read rows into job specs; options are defaults, and rows win."""

    def __init__(
        self,
        defaults: dict[str, Any],
        output: Output,
        format: str | None,
        template: str | None,
        expanded: bool,
        resolve: Callable[[Settings, Inputs], Resolution] = resolve,
    ) -> None:
        """`defaults` holds fields of Settings, and seed and count. `resolve` is the session's."""
        self.resolve = resolve
        self.defaults, self.output, self.format = defaults, output, format
        self.template, self.expanded = template, expanded
        self.filled = columns_of(template, expanded) if template is not None else []
        self.used = {*self.filled, *output.columns}  # columns beside the fields of a row
        self.inputs = Inputs()

    def read(self, found: Iterable[RowOrFault]) -> tuple[list[JobSpec], list[Fault]]:
        specs: list[JobSpec] = []
        faults: list[Fault] = []
        for row in found:
            if isinstance(row, Fault):
                faults.append(row)
                continue
            try:
                specs += list(self._specs(row))  # all or, after an error, none
            except UsageError as error:
                faults.append(fault(row, error))
            except _ColumnError as error:
                faults.append(Fault(row.number, error.column, error.message))
        return specs, faults

    def _specs(self, row: Row) -> Iterator[JobSpec]:
        given = self.defaults | row.fields
        named = row.fields.get("output")
        output = parse_job_name(named, self.format) if named is not None else self.output
        columns = {name: _column(row, name, "the name of the image") for name in output.columns}
        own = columns | ({"output": named} if named is not None else {})
        count = given.pop("count")
        seed = given.pop("seed")
        given.pop("output", None)
        if seed is None and count is not None and not 1 <= count <= MAX_IMAGES:
            raise UsageError(f"--count {count} is not between 1 and {MAX_IMAGES}")
        seeds = parse_seeds(seed, count) if seed is not None else None
        for prompt in self._prompts(row):
            resolution = self.resolve(Settings(**given | {"prompt": prompt}), self.inputs)
            yield JobSpec(row, resolution, seeds, count or 1, output, own)

    def _prompts(self, row: Row) -> list[str]:
        if self.template is None:
            prompt = row.fields.get("prompt")
            if prompt is None:
                raise _ColumnError("prompt", "is empty")
        else:
            if "prompt" in row.fields and "prompt" not in self.filled:
                raise _ColumnError("prompt", "is not used by --template")
            columns = {name: _column(row, name, "--template") for name in self.filled}
            prompt = fill(self.template, columns, self.expanded)
        if not self.expanded:
            return [prompt]
        try:
            return alternatives(prompt)
        except ValueError as error:
            raise _ColumnError("prompt", str(error)) from None


class _ColumnError(Exception):
    def __init__(self, column: str, message: str) -> None:
        self.column, self.message = column, message


def _column(row: Row, name: str, user: str) -> str:
    if name not in row.columns:
        raise _ColumnError(name, f"is empty, but {user} uses it")
    return row.columns[name]


def fault(row: Row, error: SanaError) -> Fault:
    """Return the fault with its column: the one whose option or value the message names."""
    named = [name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", error.message)]
    named += [name for name, value in row.fields.items() if repr(value) in error.message]
    column = next((name for name in named if name in row.fields), None)
    return Fault(row.number, column, error.message, error.hint)


class JobBuilder:
    """Build jobs; keep the count, the names and the repeats of all jobs built so far."""

    def __init__(self, memory: int | None) -> None:
        """`memory` is the user's limit in bytes."""
        self.memory = memory
        self.count = 0
        self.repeats: ChainMap[str, int] = ChainMap()
        # Case-folded path -> row, for file systems that ignore case.
        self.names: ChainMap[str, int] = ChainMap()

    def draft(self) -> "JobBuilder":
        """Return a builder that goes on where this one is, and leaves it there."""
        draft = copy(self)
        draft.repeats, draft.names = self.repeats.new_child(), self.names.new_child()
        return draft

    def build(
        self,
        specs: Iterable[JobSpec],
        prepare: Callable[[Resolution], "tuple[Resolution, ModelFiles]"],
        device: str,
        survived: type[SanaError] = UsageError,
    ) -> tuple[list[Job], list[Fault]]:
        """Build the jobs of some specs. `prepare` returns the files of a model and a resolution
        whose LoRAs are identified. Errors of class `survived` become faults of the row, of which
        no job is built then; others are raised."""
        jobs: list[Job] = []
        faults: list[Fault] = []
        for _, row in groupby(specs, key=lambda spec: spec.row.number):
            draft = self.draft()
            built: list[Job] = []
            errors: list[Fault] = []
            for spec in row:
                try:
                    resolution, files = prepare(spec.resolution)
                    built += draft._jobs(replace(spec, resolution=resolution), files, device)
                except survived as error:
                    errors.append(fault(spec.row, error))
            if errors:
                faults += errors
                continue
            jobs += built
            self.count = draft.count
            self.repeats.update(draft.repeats.maps[0])
            self.names.update(draft.names.maps[0])
        return jobs, faults

    def _jobs(self, spec: JobSpec, files: "ModelFiles", device: str) -> Iterator[Job]:
        first = spec.resolution.recipe(files, device, 0, self.memory)
        check_size(first, spec.output.format)
        what = first.as_dict() | {"columns": spec.columns}
        for part in ("seed", *PRECISION):
            what.pop(part, None)
        asked = spec.resolution.settings
        precision = {"dtype": asked.dtype, "text_precision": asked.text_precision}
        start = int(_hash(what)[:8], 16) % (SEED_LIMIT - MAX_IMAGES)
        count = spec.count if spec.seeds is None else len(spec.seeds)
        if self.count + count > MAX_IMAGES:
            raise UsageError(f"there are more than {MAX_IMAGES} jobs", "split the file")
        for i in range(count):
            seed = None if spec.seeds is None else spec.seeds[i]
            alike = _hash(what | precision | {"seed": seed})
            before = self.repeats.get(alike, 0)
            self.repeats[alike] = before + 1
            self.count += 1
            recipe = replace(first, seed=start + before if seed is None else seed)
            id = _hash(what | precision | {"seed": recipe.seed, "before": before})[:ID_DIGITS]
            name = spec.output.path(recipe, self.count, spec.columns | {"id": id})
            self._take(name, spec.row)
            yield Job(id, spec.row.number, recipe, spec.resolution, name, spec.output.format)

    def _take(self, name: Path, row: Row) -> None:
        key = name.as_posix().casefold()
        if key in self.names:
            other = self.names[key]
            where = "twice" if other == row.number else f"of row {other} as well"
            raise UsageError(f"--output {name} is the name {where}", "add {id} or {seed} to it")
        self.names[key] = row.number


def _hash(what: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
