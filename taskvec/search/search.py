"""Search for the best merge: candidates are merged sparse and switched on one model, which is loaded once."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint
from taskvec_formats.system.memory import release_freed_memory
from taskvec_formats.system.signals import deferred_signals

from ..errors import DataError, DTypeError, MergeError, TrainingError, UsageError
from ..evaluation.estimate import Estimate, Scores, estimate
from ..merging.combine import merge
from ..reporting.progress import Progress, silent
from ..vectors.source import Memory
from ..vectors.vector import TaskVector
from .data import TaskData
from .space import Candidate, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

NAME = "taskvec"  # of the study in its file
_RECORD = "search"  # user attribute of the study
_ERROR = "error"  # user attribute of a trial that failed
# entry of the record -> what is said if it differs
_DIFFERENCES = {
    "vectors": "it has other vectors, or the same in another order",
    "data": "it has other data, or other parts of it (`limit`, `holdout`)",
    "methods": "it tries other methods (`method`)",
    "by": "it has other groups of tensors (`by`)",
}
_MINIMIZED = ("loss",)
_FIRST = 4  # the first part of the data is one fourth; candidates that are bad on it are pruned


@dataclass(frozen=True)
class Settings:
    """How candidates are compared.

    Attributes:
        metric: "loss", "exact_match" or "rouge1".
        pareto: Whether each task is an objective of its own. Otherwise the objective is the mean over the tasks.
        seed: The seed of the search.
        device: As in `evaluate_variants`.
        batch_size: As in `evaluate`.
        max_length: As in `evaluate`.
        max_new_tokens: As in `evaluate`.
        trust_remote_code: As in `evaluate_variants`.
    """

    metric: str = "loss"
    pareto: bool = False
    seed: int = 0
    device: str = "auto"
    batch_size: int = 32
    max_length: int = 1024
    max_new_tokens: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        number: Its number, from 0.
        candidate: The merge.
        values: The objectives; None if it was not completed.
        state: "complete", "pruned" or "failed".
        seconds: The time of the merge and the switch of the model.
        error: Why it failed; None otherwise.
    """

    number: int
    candidate: Candidate
    values: tuple[float, ...] | None
    state: str
    seconds: float | None
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A merge beside plain TIES, on the examples that were held out from the search.

    Attributes:
        trial: The number of the trial.
        metrics: Task -> metric of the merge.
        plain: Task -> metric of plain TIES; empty if it cannot be evaluated.
        gain: By how much the mean over the tasks is better than that of plain TIES, on the same examples; None if plain
            TIES cannot be evaluated.
        is_plain: Whether the merge is plain TIES.
    """

    trial: int
    metrics: Mapping[str, Estimate]
    plain: Mapping[str, Estimate]
    gain: Estimate | None
    is_plain: bool = False

    @property
    def is_better(self) -> bool:
        """Whether the gain is more than two standard errors."""
        gain = self.gain
        return gain is not None and gain.standard_error is not None and gain.value > 2 * gain.standard_error


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        trials: The trials that were completed or pruned, or failed, in their order. Trials that were interrupted are
            not listed.
        best: The comparison of the best trial with plain TIES; with several objectives those of the Pareto front, the
            best mean first. Empty if no trial was completed.
        vector: The best merge, computed when it is read or saved. None if no trial was completed.
        plain_error: Why plain TIES cannot be evaluated; None otherwise.
    """

    trials: tuple[TrialRow, ...]
    best: tuple[Comparison, ...]
    vector: TaskVector | None
    plain_error: str | None = None

    def candidate(self, number: int) -> Candidate:
        """Return the merge of a trial."""
        return next(row.candidate for row in self.trials if row.number == number)


class Search:
    """A search.

    Args:
        vectors: The vectors to merge.
        base: The model folder that they start from.
        data: The data of each task.
        space: What is searched.
        settings: How candidates are compared.
        study: The file of an Optuna study in SQLite, which keeps the trials. If it exists, the search goes on. None
            keeps them in memory.
        progress: Called while the model is loaded, and for each trial.

    Raises:
        UsageError: The file is not a study of this search, or optuna is missing.
        TrainingError: The model cannot be loaded or evaluated.
        BaseMismatchError: The vectors do not fit the base.
    """

    def __init__(
        self,
        vectors: Sequence[TaskVector],
        base: Checkpoint,
        data: Sequence[TaskData],
        space: Space,
        settings: Settings,
        study: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        self._vectors, self._base, self._data = list(vectors), base, list(data)
        self._space, self._settings, self._progress = space, settings, progress
        record = record_of(self._vectors, self._data, space, settings)
        self._study = _opened(study, record, settings, len(self._data))
        from ..evaluation.evaluate import load_for_evaluation

        self._model, self._tokenizer = load_for_evaluation(
            base, settings.device, trust_remote_code=settings.trust_remote_code, progress=progress
        )
        from ..models.attach import attach
        from ..models.live import is_rounded
        from ..models.live_state import state_of

        self._held = [_held(vector) for vector in self._vectors]  # reading files would take longer than merging
        self._handle = attach(self._model, None, base=base if is_rounded(self._model, base) else None)
        state = state_of(self._model)
        state.limit = 0  # no merge is tried twice
        state.is_private = True  # nobody else has this model
        for vector in self._held:
            self._handle.swap(vector, progress=progress)  # checks that it fits

    @property
    def finished(self) -> int:
        """The number of trials that were completed or pruned, or failed."""
        return sum(map(_is_finished, self._study.get_trials(deepcopy=False)))

    def run(self, trials: int, timeout: float | None = None) -> None:
        """Run trials until there are `trials` in the study.

        SIGINT and SIGTERM are handled between batches of examples: an exception in the middle of a transaction would
        become an error of the database, and one in the middle of a destructor would be lost.

        Args:
            trials: The number of trials, with those of earlier runs and of other processes.
            timeout: The number of seconds after which no trial is begun. None sets no limit.
        """
        end = None if timeout is None else monotonic() + timeout
        with deferred_signals(second_at_once=True) as check:
            if not any(
                _is_finished(trial) or _is(trial, "WAITING") for trial in self._study.get_trials(deepcopy=False)
            ):
                self._study.enqueue_trial(self._space.plain)  # again, if the one before was interrupted
            while (done := self.finished) < trials and (end is None or monotonic() < end):
                self._progress("searching", done, trials, self._best_so_far())
                check()
                begun = [t for t in self._study.get_trials(deepcopy=False) if _is_finished(t) or _is(t, "RUNNING")]
                self._study.sampler = _sampler(self._settings.seed, len(begun))
                self._run_one(self._study.ask(), check)
        self._progress("searching", trials, trials, self._best_so_far())

    def _run_one(self, trial: Trial, check: Callable[[], None]) -> None:
        try:
            self._try(trial, check)
        except (MergeError, TrainingError, DataError, DTypeError) as error:  # of this merge: others may be better
            trial.set_user_attr(_ERROR, str(error))
            self._study.tell(trial, state=_state("FAIL"))
        except BaseException:
            with suppress(ValueError):  # it may have been told already
                self._study.tell(trial, state=_state("FAIL"))
            raise

    def _try(self, trial: Trial, check: Callable[[], None]) -> None:
        with _quiet():
            candidate = self._space.suggest(trial)
        start = monotonic()
        self._switch(candidate.merged(self._held, self._base))
        trial.set_user_attr("seconds", monotonic() - start)
        scores: dict[str, Scores] = {}
        parts = 1 if self._settings.pareto else 2
        for part in range(parts):
            for task in self._data:
                first = len(task.chosen_on) // _FIRST if parts == 2 else 0
                examples = task.chosen_on[:first] if part == 0 and parts == 2 else task.chosen_on[first:]
                if examples:
                    found = self._evaluate(examples, check)
                    scores[task.name] = scores[task.name] + found if task.name in scores else found
            if part < parts - 1 and len(scores) == len(self._data):
                trial.report(_mean(scores).value, part)
                if trial.should_prune():
                    self._study.tell(trial, state=_state("PRUNED"))
                    return
        values = [scores[task.name].estimate.value for task in self._data]
        self._study.tell(trial, values if self._settings.pareto else [sum(values) / len(values)])

    def _switch(self, vector: TaskVector) -> None:
        self._handle.swap(None)  # first, so that one merge at a time is in memory
        release_freed_memory()
        self._handle.swap(vector)

    def _evaluate(self, examples: Sequence[Any], check: Callable[[], None] = lambda: None) -> Scores:
        from ..evaluation.evaluate import evaluate

        settings = self._settings
        found = evaluate(
            self._model,
            self._tokenizer,
            examples,
            [settings.metric],
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            max_new_tokens=settings.max_new_tokens,
            progress=lambda *_: check(),
        )
        return found.scores[settings.metric]

    def _best_so_far(self) -> str:
        if self._settings.pareto or not any(t.state.name == "COMPLETE" for t in self._study.get_trials(deepcopy=False)):
            return ""
        return f"best {self._settings.metric} {self._study.best_value:.4g}"

    def result(self) -> SearchResult:
        """Evaluate the best merge and plain TIES on the examples that were held out, and return the result."""
        trials = [self._row(trial) for trial in self._study.get_trials(deepcopy=False) if _is_finished(trial)]
        best = sorted(self._study.best_trials, key=self._rank) if any(row.values for row in trials) else []
        if not best:
            return SearchResult(tuple(trials), (), None)
        if not self._settings.pareto:
            best = best[:1]  # others have the same value
        try:
            plain = self._reported(merge(self._held, "ties"), "plain ties")
            plain_error = None
        except (MergeError, TrainingError, DataError, DTypeError) as error:
            plain, plain_error = {}, str(error)
        found = [self._comparison(trial, plain) for trial in best]
        vector = self._candidate(best[0]).merged(self._vectors, self._base)
        vector.provenance["search"] = {
            "trials": self.finished,
            "trial": best[0].number,
            "value": best[0].values,
            **record_of(self._vectors, self._data, self._space, self._settings),
        }
        return SearchResult(tuple(trials), tuple(found), vector, plain_error)

    @cached_property
    def _sign(self) -> int:
        return -1 if self._settings.metric in _MINIMIZED else 1

    def _rank(self, trial: FrozenTrial) -> tuple[float, int]:
        return -self._sign * sum(trial.values), trial.number

    def _comparison(self, trial: FrozenTrial, plain: Mapping[str, Scores]) -> Comparison:
        found = self._reported(self._candidate(trial).merged(self._held, self._base), f"trial {trial.number}")
        gain = None
        if plain:
            gains = [found[task].minus(plain[task]) for task in found]
            errors = [each.standard_error or 0.0 for each in gains]
            mean = self._sign * sum(each.value for each in gains) / len(gains)
            gain = Estimate(mean, sum(error**2 for error in errors) ** 0.5 / len(gains))
        metrics, plains = ({task: each.estimate for task, each in scores.items()} for scores in (found, plain))
        is_plain = trial.params == self._space.plain and trial.params["method"] == "ties"
        return Comparison(trial.number, metrics, plains, gain, is_plain)

    def _reported(self, vector: TaskVector, name: str) -> dict[str, Scores]:
        self._progress(f"evaluating {name}", 0, 1, "")
        self._switch(vector)
        found = {task.name: self._evaluate(task.reported_on) for task in self._data}
        self._progress(f"evaluating {name}", 1, 1, "")
        return found

    def _candidate(self, trial: FrozenTrial) -> Candidate:
        from optuna.trial import FixedTrial

        with _quiet():
            return self._space.suggest(FixedTrial(trial.params))  # type: ignore[arg-type]

    def _row(self, trial: FrozenTrial) -> TrialRow:
        complete = _is(trial, "COMPLETE")
        values = tuple(trial.values) if trial.values is not None and complete else None
        state = "complete" if complete else "pruned" if _is(trial, "PRUNED") else "failed"
        attributes = trial.user_attrs
        return TrialRow(
            trial.number, self._candidate(trial), values, state, attributes.get("seconds"), attributes.get(_ERROR)
        )


def _is(trial: FrozenTrial, state: str) -> bool:
    return trial.state.name == state


def _is_finished(trial: FrozenTrial) -> bool:
    """Return whether a trial counts, unlike one that was interrupted or is running."""
    return trial.state.name in ("COMPLETE", "PRUNED") or (_is(trial, "FAIL") and _ERROR in trial.user_attrs)


def record_of(
    vectors: Sequence[TaskVector], data: Sequence[TaskData], space: Space, settings: Settings
) -> dict[str, Any]:
    """Return what identifies a search, as JSON values: the vectors, the data, and what is compared how."""
    return {
        "vectors": [vector.digest for vector in vectors],
        "base": vectors[0].base.fingerprint,
        "data": {
            task.name: {
                "files": [dict(file) for file in task.files],
                "chosen_on": len(task.chosen_on),
                "reported_on": len(task.reported_on),
            }
            for task in data
        },
        "methods": list(space.methods),
        "by": list(space.groups),
        "metric": settings.metric,
        "pareto": settings.pareto,
        "seed": settings.seed,
        "max_length": settings.max_length,
        "max_new_tokens": settings.max_new_tokens,
    }


def _held(vector: TaskVector) -> TaskVector:
    """Return a vector with its deltas in memory. Merges use nothing else of it."""
    deltas = {name: vector[name] for name in vector}
    return TaskVector(vector.header, vector.specs.values(), Memory(deltas, vector.specs), vector.name)


def _mean(scores: Mapping[str, Scores]) -> Estimate:
    return estimate([each.estimate.value for each in scores.values()])


def _opened(path: Path | None, record: dict[str, Any], settings: Settings, tasks: int) -> Study:
    """Create a study, or open the one in a file and check that it is of this search."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction = "minimize" if settings.metric in _MINIMIZED else "maximize"
    directions = [direction] * (tasks if settings.pareto else 1)
    with _quiet():
        storage = None if path is None else _storage(path)
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            directions=directions,  # type: ignore[arg-type]
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=8),
        )
    known = study.user_attrs.get(_RECORD)
    if not any(map(_is_finished, study.get_trials(deepcopy=False))):
        study.set_user_attr(_RECORD, record)  # the one of a search that ended before its first result does not matter
    elif known != record:
        name = next(key for key in {**(known or {}), **record} if (known or {}).get(key) != record.get(key))
        there, here = (known or {}).get(name), record.get(name)
        is_short = all(isinstance(value, (str, int, float, bool, type(None))) for value in (there, here))
        values = f"{name} is {there!r} there, but {here!r} here" if is_short else _DIFFERENCES.get(name, name)
        raise UsageError(f"{path} is the study of another search: {values}")
    return study


def _storage(path: Path) -> Any:
    import optuna
    from sqlalchemy.exc import DBAPIError

    where = path.absolute()  # sqlite3 gives some relative names, such as :memory:, a meaning
    try:
        if where.exists() and where.stat().st_size:
            with closing(sqlite3.connect(f"{where.as_uri()}?mode=ro", uri=True)) as file:
                tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            if tables and "studies" not in tables:
                raise UsageError(f"{path} is a database of another program: it has the table {min(tables)!r}")
        # the path is not part of the address of the database, in which some characters have a meaning
        storage = optuna.storages.RDBStorage(
            "sqlite:///study",
            engine_kwargs={"creator": lambda: sqlite3.connect(where, timeout=60, check_same_thread=False)},
        )
        others = [study.study_name for study in storage.get_all_studies() if study.study_name != NAME]
    except (DBAPIError, sqlite3.Error, RuntimeError) as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0]
        raise UsageError(f"{path} is not an Optuna study in SQLite, or cannot be written: {reason}") from None
    if others:
        raise UsageError(f"{path} contains the study {others[0]!r} of another program")
    return storage


def _sampler(seed: int, number: int) -> Any:
    """Return a sampler whose choices depend on the seed and the trials before, not on how often the search stopped."""
    import optuna

    with _quiet():
        return optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % (1 << 32), multivariate=True, group=True)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of optuna that its interface may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
