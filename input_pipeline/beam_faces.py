"""The same examples by Apache Beam (`pip install 'coatnet-jax[beam]'`), for sets too large for one
machine: the files of a zip or a folder are read in parts, a tar as one.

The workers must see the source and the folder for the data under the same paths.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import apache_beam as beam

from input_pipeline.archive import Part, Source, iter_part, split_source
from input_pipeline.scan import Copies, Reading, check, example

SKIPS = "skipped"  # the files that list what was left out begin with this


class Faces(beam.PTransform):
    """Yields (file, example) of every face in a source, as `scan.iter_faces` does."""

    def __init__(self, source: Source, reading: Reading, skips: Path):
        super().__init__()
        self._source, self._reading, self._skips = source, reading, str(skips)

    def expand(self, pipeline):
        parts = list(enumerate(split_source(self._source)))
        read = (
            pipeline
            | "Parts" >> beam.Create(parts)
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.FlatMap(_read_part, self._reading).with_outputs("skip", main="faces")
        )
        kept = (
            read.faces
            | "ByName" >> beam.GroupByKey()
            | "Copies" >> beam.FlatMap(_keep_first).with_outputs("skip", main="faces")
        )
        (
            (read.skip, kept.skip)
            | "Skips" >> beam.Flatten()
            | "AsText" >> beam.Map(json.dumps)
            | "Write" >> beam.io.WriteToText(f"{self._skips}/{SKIPS}", ".jsonl")
        )
        return kept.faces


def read_skips(folder: Path) -> list[tuple[str, str]]:
    """Returns (path, reason) of the files that the workers left out."""
    lines = [
        line for path in folder.glob(f"{SKIPS}*.jsonl") for line in path.read_text().splitlines()
    ]
    return sorted((path, reason) for path, reason in map(json.loads, lines))


def _read_part(numbered: tuple[int, Part], reading: Reading) -> Iterator:
    """Yields (name, (place in the source, path, label, picture)), and what is left out."""
    number, part = numbered
    skipped: list[tuple[str, str]] = []

    def on_skip(path: str, reason: str) -> None:
        skipped.append((path, reason))

    for place, (path, data) in enumerate(iter_part(part, on_skip=on_skip)):
        try:
            label = reading.read_label(path)
            picture = check(data, reading.transform)
        except ValueError as error:
            on_skip(path, str(error))
            continue
        yield reading.short_name(path), ((number, place), path, label, picture)
    for found in skipped:
        yield beam.pvalue.TaggedOutput("skip", found)


def _keep_first(named: tuple[str, Iterable]) -> Iterator:
    """Yields (file, example) of the files of one name, in the order of the source."""
    name, found = named
    copies = Copies(name)
    for _, path, label, picture in sorted(found, key=lambda entry: entry[0]):
        placed = copies.place(path, picture.pixel_hash, label)
        if placed.first:
            reason = f"duplicate file name (first at {placed.first})"
            yield beam.pvalue.TaggedOutput("skip", (path, reason))
        else:
            yield placed.file, example(placed.file, label, picture)
