"""Event files read in slices, each by a process that shares nothing but files with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from service.core.spec import FeatureSpec
from training import joins
from training.connection import alone
from training.eventfiles import find_files, glob_of, groups, told
from training.relation import Relation, latest, rejects
from training.source import MOST_PARTITIONS, partition_count
from training.summary import Counts, Summary, count, judge, summarise, with_joined


@dataclass(frozen=True)
class Slicing:
    """A reading of event files in slices, each by a process that shares nothing but files with the others."""

    spec: FeatureSpec
    files: tuple[Path, ...]
    directory: Path
    partitions: int
    latest_ms: int
    memory_limit: str
    relations: tuple[Relation, ...]
    slices: tuple[tuple[int, str], ...]  # the number of a relation, and what to scan instead of all of it

    def summarise(self, found: Sequence[Slice], counts: Sequence[Counts], max_bad_rows: int) -> Summary:
        """The summary that `read` gives. Raises what it raises."""
        missing = set.intersection(
            *(
                {name for one in found if one.relation == number for name in one.missing}
                for number in range(len(self.relations))
            )
        )
        rejected = sum(one.rejected for one in found), [line for one in found for line in one.lines][:3]
        summary = summarise(self.spec, self.files, counts, missing, rejected)
        judge(summary, self.spec, max_bad_rows, self.relations)
        return summary

    def joined(self, connection: duckdb.DuckDBPyConnection, summary: Summary) -> Summary:
        """The summary once it is known who was joined into whom: if anybody was, `move_slice` has to follow."""
        return with_joined(connection, self.directory, self.relations, summary)


@dataclass(frozen=True)
class Slice:
    """What was found while a slice was read."""

    relation: int
    missing: frozenset[str]
    rejected: int
    lines: tuple[str, ...]


def sliced(
    connection: duckdb.DuckDBPyConnection,
    paths: Sequence[str],
    spec: FeatureSpec,
    workdir: Path,
    most: int,
    memory_limit: str,
) -> Slicing:
    """Event files in at most about so many slices: of Parquet rows, of other files whole files."""
    files = [file.absolute() for file in find_files(paths)]
    relations = [Relation(connection, spec, *group) for group in groups(files, spec)]
    slices = [(number, scan) for number, relation in enumerate(relations) for scan in relation.scans(most)]
    partitions = max(partition_count(connection, files), min(most, MOST_PARTITIONS))
    return Slicing(
        spec,
        tuple(files),
        workdir.absolute(),
        partitions,
        latest(None),
        memory_limit,
        tuple(relations),
        tuple(slices),
    )


def read_slice(job: Slicing, index: int) -> Slice:
    """Write the normalised events of a slice into the directory of all of them."""
    number, scan = job.slices[index]
    with alone(job.directory, job.memory_limit) as connection:
        relation = job.relations[number].attached(connection, scan)
        relation.copy(job.directory / f"slice{index}", job.partitions, job.latest_ms, None)
        rejected, lines = rejects(connection)
    return Slice(number, frozenset(relation.missing), rejected, tuple(lines))


def count_partition(job: Slicing, index: int) -> Counts:
    """What a partition holds, once all slices are read."""
    files = [glob_of(file) for file in job.directory.glob(f"*/part={index}/*.parquet")]
    with alone(job.directory, job.memory_limit) as connection:
        return count(connection, job.spec, files)


def move_slice(job: Slicing, index: int) -> None:
    """Give what joined visitors did to whom it belongs, in some partitions: every so many-th as there are slices."""
    parts = range(index, job.partitions, len(job.slices))
    files = [glob_of(file) for part in parts for file in job.directory.glob(f"slice*/part={part}/*.parquet")]
    if files:
        with alone(job.directory, job.memory_limit) as connection, told():
            target = job.directory / f"{joins.MOVED}{index}"
            joins.move(connection, job.directory, files, job.partitions, target)
