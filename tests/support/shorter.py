"""A stream transform for tests: the last task never comes."""

from dataclasses import replace

from clmerge.streams.transforms import StreamTransform


class Shorter(StreamTransform):
    """Leave the last task out; the classes stay those of the whole stream."""

    def apply(self, plan):
        return replace(plan, tasks=plan.tasks[:-1], splits=plan.splits[:-1])
