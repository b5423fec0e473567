"""Pipeline: passes one after another, reported as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from adaptc.adapter import Adapter
from adaptc.errors import AdaptcError, UsageError
from adaptc.passes import Context, Join, Outcome, Pass, located, one_blas_thread, run
from adaptc.report import Row, compare


@dataclass(frozen=True)
class Pipeline:
    """Passes one after another; itself a pass. Rows compare the first input with the last output.

    The first step may be a Join: then the pipeline takes several adapters, and rows compare with what was joined.
    """

    steps: tuple[Pass | Join, ...] = field(default_factory=tuple)
    name: ClassVar[str] = "pipeline"

    @property
    def container(self) -> str:
        """The dialect that the last pass with a container needs, "" where none does."""
        return next((s.container for s in reversed(self.steps) if isinstance(s, Pass) and s.container), "")

    def __post_init__(self) -> None:
        for step in self.steps[1:]:
            if isinstance(step, Join):
                raise UsageError(f"{step.name} takes several adapters, so it must be the first step")

    def __call__(self, adapter: Adapter | Sequence[Adapter], ctx: Context | None = None) -> Outcome:
        """Run every step. A failure names what ran before it."""
        if self.steps and isinstance(self.steps[0], Join):
            return self._joined([adapter] if isinstance(adapter, Adapter) else adapter, ctx)
        if not isinstance(adapter, Adapter):
            if len(adapter) != 1:
                raise UsageError(f"{len(adapter)} adapters for passes that take one", hint="merge comes first")
            adapter = adapter[0]
        now = adapter
        done: list[str] = []
        rows: dict[str, Row] = {}
        notes: list[str] = []
        for step in self.steps:
            assert isinstance(step, Pass)
            try:
                outcome = step(now, ctx)
            except AdaptcError as e:
                ran = f" (after {', '.join(done)})" if done else ""
                raise located(e, f"{e}{ran}") from e
            now = outcome.adapter
            if done and outcome.notes:
                notes.append(f"{step.name} starts from what ran before it and is {outcome.error:.3g} away from that, "
                             f"which its notes compare with")
            done.append(str(step))
            notes += outcome.notes
            rows |= {r.key: r for r in outcome.rows}
        if len(self.steps) > 1:
            keys, context = list(adapter.deltas), ctx or Context()
            with one_blas_thread():
                compared = run(lambda k: compare(k, adapter.deltas[k], now.deltas.get(k)), keys, context, "error")
            rows = dict(zip(keys, compared, strict=True))
        return Outcome(now, tuple(rows.values()), tuple(notes))

    def _joined(self, adapters: Sequence[Adapter], ctx: Context | None) -> Outcome:
        join = self.steps[0]
        assert isinstance(join, Join)
        first = join(adapters, ctx)
        if len(self.steps) == 1:
            return first
        try:
            rest = Pipeline(self.steps[1:])(first.adapter, ctx)
        except AdaptcError as e:
            raise located(e, f"{e} (after {join})") from e
        said = f"errors count from what {join.name} made, itself {first.error:.3g} from the weighted sum"
        return Outcome(rest.adapter, rest.rows, (said, *first.notes, *rest.notes))

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))
