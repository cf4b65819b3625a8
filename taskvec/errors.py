"""What can go wrong in the library, typed. The command line turns each into one sentence and an exit code."""

from taskvec_formats.errors import PlainError


class TaskvecError(PlainError):
    """Root of the library's own errors. The message is one sentence for a person; exit code 1."""


class UsageError(TaskvecError):
    """A request that cannot be meant: a sparsity outside (0, 1), a path that is not there; exit code 2."""


class OutputExistsError(UsageError):
    """The output is already there and `force` was not given."""


class BaseMismatchError(TaskvecError):
    """A vector meets a checkpoint, or another vector, that does not share its base."""


class AlreadyAppliedError(BaseMismatchError):
    """The checkpoint is not the base but already the result."""


class KindError(TaskvecError):
    """A patch where deltas are needed."""


class DiffError(TaskvecError):
    """Base and tuned are not two states of one model."""


class MaskError(TaskvecError):
    """A mask of exactly k entries cannot be drawn."""


class MergeError(TaskvecError):
    """The vectors cannot be merged by the method asked for."""


class TokenizerError(TaskvecError):
    """A tokenizer file does not say what its tokens are."""


class DTypeError(TaskvecError):
    """A tensor has a value that the dtype asked for cannot hold."""


class SizeError(TaskvecError):
    """A result is larger than is allowed, or than the disk can hold."""


class ResultError(TaskvecError):
    """A finished output is not what was to be written; it does not appear under its name."""


class ResumeError(TaskvecError):
    """A folder holds the unfinished work of another run."""


class DataError(TaskvecError):
    """A training or evaluation file has a bad line; file and line number are named."""


class TrainingError(TaskvecError):
    """A model cannot be trained as asked."""


class DivergedError(TrainingError):
    """A loss of training is no longer a number."""
