"""The exceptions of the library. The command line prints each as one sentence and sets the exit code."""

from taskvec_formats.errors import PlainError


class TaskvecError(PlainError):
    """Base class of the library's exceptions. The message is one sentence; exit code 1."""


class UsageError(TaskvecError):
    """An invalid request, such as a sparsity outside (0, 1) or a path that does not exist; exit code 2."""


class OutputExistsError(UsageError):
    """The output exists and `force` is False."""


class BaseMismatchError(TaskvecError):
    """A vector does not share the base of the checkpoint or vector that it is combined with."""


class AlreadyAppliedError(BaseMismatchError):
    """The checkpoint already has the tuned values."""


class KindError(TaskvecError):
    """A patch was given, but deltas are needed."""


class DiffError(TaskvecError):
    """Base and tuned are not two states of one model."""


class MaskError(UsageError):
    """A mask does not fit the model, or has too few entries."""


class MergeError(TaskvecError):
    """The vectors cannot be merged by the requested method."""


class TokenizerError(TaskvecError):
    """A tokenizer file does not define its tokens."""


class DTypeError(TaskvecError):
    """A tensor has a value that the requested dtype cannot represent."""


class SizeError(TaskvecError):
    """A result is larger than allowed, or does not fit on the disk."""


class ResultError(TaskvecError):
    """A finished output differs from the plan. It is not moved to its final name."""


class ResumeError(TaskvecError):
    """A folder contains the unfinished work of another run."""


class ConversionError(TaskvecError):
    """A file of another format cannot be read, does not fit the base, or cannot hold a vector."""


class AdapterError(ConversionError):
    """An adapter of peft cannot be read, does not fit the base, or cannot hold a vector."""


class DataError(TaskvecError):
    """A training or evaluation file has an invalid line. The message names the file and the line number."""


class TrainingError(TaskvecError):
    """A model cannot be trained with the given options."""


class StoppedError(TrainingError):
    """Training was stopped by a signal, after the step that it interrupted. The exit code is 128 + the signal.

    Args:
        message: The message.
        signal: The number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class DivergedError(TrainingError):
    """The training loss is not a finite number."""


class ProcessError(TrainingError):
    """Another process of a distributed run has ended or does not answer."""


class HubError(TaskvecError):
    """The Hugging Face Hub cannot be reached, refuses a request, or does not have what is asked for.

    Args:
        message: The message.
        is_final: Whether the Hub has said that the revision or the file does not exist, so that an older state in its
            cache is of no use.
    """

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
