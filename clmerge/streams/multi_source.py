"""The common base of streams with one data set per task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

from typing_extensions import override

from clmerge.names import safe_name
from clmerge.streams.avalanche_index import experience_indices, one_experience_each
from clmerge.streams.layout import ValidationCut
from clmerge.streams.plan import StreamPlan, Task
from clmerge.streams.source_groups import SourceGroup
from clmerge.streams.sources import DataSource
from clmerge.streams.stream import Stream
from clmerge.streams.task_names import unique_names


class MultiSourceStream(Stream):
    """One task per data source; subclasses map the classes of a source to global classes."""

    def __init__(self, sources: Sequence[DataSource] | SourceGroup, name: str, validation: ValidationCut) -> None:
        if not isinstance(sources, SourceGroup) and not sources:
            raise ValueError("expected at least one data source, got none")
        self._given = sources
        self._name = name
        self.validation = validation

    @cached_property
    def sources(self) -> list[DataSource]:
        """The data sources in the order of their tasks."""
        return self._given.sources() if isinstance(self._given, SourceGroup) else list(self._given)

    @property
    @override
    def name(self) -> str:
        return self._name

    @abstractmethod
    def _classes(self) -> tuple[list[str], list[dict[int, int]], list[tuple[int, int]]]:
        """Lay out the classes.

        Returns:
            Display names by global class id; per source, the global class id of each label; and per global
            class, the source and its label that the class's prompts are taken from.
        """

    @override
    def _build(self) -> StreamPlan:
        sources = self.sources
        class_names, to_global, origins = self._classes()
        for source in sources:
            if not source.train().targets or not source.test().targets:
                raise ValueError(f"expected train and test images in {source.name}, got none in one of them")
        benchmark = one_experience_each(
            [[to_global[i][label] for label in source.train().targets] for i, source in enumerate(sources)],
            [[to_global[i][label] for label in source.test().targets] for i, source in enumerate(sources)],
        )
        task_names = unique_names([safe_name(source.name) for source in sources])
        tasks = []
        for index, experience in enumerate(benchmark.train_stream):
            classes = tuple(sorted(int(class_id) for class_id in experience.classes_in_this_experience))
            tasks.append(Task(index, task_names[index], classes, tuple(class_names[c] for c in classes)))
        splits = [
            self.validation.splits(
                source,
                train=experience_indices(train_exp),
                test=experience_indices(test_exp),
                to_global=to_global[index],
            )
            for index, (source, train_exp, test_exp) in enumerate(
                zip(sources, benchmark.train_stream, benchmark.test_stream, strict=True)
            )
        ]
        prompt_names = [sources[source].prompt_names[label] for source, label in origins]
        return StreamPlan(
            tuple(tasks),
            tuple(splits),
            tuple(class_names),
            tuple(prompt_names),
            tuple(sources[source] for source, _ in origins),
        )
