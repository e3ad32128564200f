"""Bodies of text."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from actors.contracts import names
from actors.contracts.artifacts import ArtifactRef
from actors.contracts.settings import Doc, Known, LocalPath, NotInKey, Settings


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """A body of text: exactly one of `builtin` and `path`."""

    builtin: Annotated[str | None, Known(names.TEXTS), Doc("Name of a text that ships with the project.")] = (
        None
    )
    path: Annotated[
        str | None,
        LocalPath(),
        Doc("Local .txt, .jsonl, .json, .csv or .parquet file, or hub data set."),
    ] = None
    config: Annotated[str | None, Doc("Configuration name of a hub data set.")] = None
    split: Annotated[str, Doc("Split of a hub data set.")] = "train"
    revision: Annotated[str | None, Doc("Branch, tag or commit of a hub data set.")] = None
    text_column: Annotated[str, Doc("Column that holds the text.")] = "text"
    prompt_column: Annotated[str | None, Doc("Column with prompts, for training on answers.")] = None
    input_column: Annotated[str | None, Doc("Column added to the prompt where it is not empty.")] = None
    response_column: Annotated[str | None, Doc("Column with the answers to the prompts.")] = None
    messages_column: Annotated[
        str | None, Doc("Column with whole conversations: lists of {role, content}.")
    ] = None
    chat_template: Annotated[
        str | None,
        LocalPath(names=("plain",)),
        Doc("How conversations are written: the tokenizer's way, plain, or a Jinja file."),
    ] = None
    streaming: Annotated[bool, Doc("Read records as they are needed; for large data.")] = False
    max_bad_rows: Annotated[
        float,
        Ge(0),
        Le(1),
        NotInKey(),
        Doc("Largest share of rows that cannot be used and are skipped; in a stream of at least 1000 rows."),
    ] = 0.01

    def __post_init__(self) -> None:
        if (self.builtin is None) == (self.path is None):
            raise ValueError("give exactly one of `builtin` and `path`")


@dataclass(frozen=True, kw_only=True)
class TextSpec(TextSettings):
    """A body of text: a built-in name, a file, a hub data set, or responses that a stage generated.

    For objectives that train on answers, a record is a conversation: either
    `messages_column` (a list of {role, content}), or `prompt_column`, with
    `input_column` added to it where that is not empty, and `response_column`.
    `chat_template` is the tokenizer's own if None, `plain`, or a Jinja file.
    With `streaming`, records are read as they are needed and never all held.

    A plan adds what it found: the text's `fingerprint`, so that another text in its
    place is refused where it is read, the `commit` of a hub data set, which is read from then on, and
    the content `template` of a Jinja file.
    """

    generated: ArtifactRef | None = None
    fingerprint: str | None = field(default=None, compare=False)
    commit: str | None = field(default=None, compare=False)
    template: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Allow a text without a source, which is refused where it is read."""

    @property
    def name(self) -> str:
        """The text in messages: its built-in name, its path as given, or where responses lie."""
        return self.builtin or self.path or (self.generated.uri if self.generated else "")

    @property
    def conversations(self) -> bool:
        """True if records are conversations, or prompts of such, rather than running text."""
        return any((self.prompt_column, self.messages_column, self.generated))


@dataclass(frozen=True)
class RowCounts:
    """Rows of a text that were read, and those of them that were left out.

    `bad` ones hold no text that can be used, `unanswered` ones are conversations
    without an answer within the length.
    """

    read: int = 0
    bad: int = 0
    unanswered: int = 0


NO_ROWS = RowCounts()


@dataclass(frozen=True)
class TextInfo:
    """What is known of a text before it is used; `spec` holds what was found (see `TextSpec`)."""

    spec: TextSpec
    fingerprint: str
    num_rows: int | None
