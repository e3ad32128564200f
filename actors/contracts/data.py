"""Bodies of text."""

from dataclasses import dataclass, field

from actors.contracts.artifacts import ArtifactRef


@dataclass(frozen=True)
class TextSpec:
    """A body of text: a built-in name, a file, a hub data set, or responses that a stage generated.

    For objectives that train on answers, a record is a conversation: either
    `messages_column` (a list of {role, content}), or `prompt_column`, with
    `input_column` added to it where that is not empty, and `response_column`.
    `chat_template` is the tokenizer's own if None, `plain`, or a Jinja file.
    With `streaming`, records are read as they are needed and never all held.

    A plan adds what it found: the text's `fingerprint`, so that another text in its
    place is refused where it is read, and the content `template` of a Jinja file.
    """

    builtin: str | None = None
    path: str | None = None
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    prompt_column: str | None = None
    input_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None
    chat_template: str | None = None
    streaming: bool = False
    generated: ArtifactRef | None = None
    fingerprint: str | None = field(default=None, compare=False)
    template: str | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The text in messages: its built-in name, its path as given, or where responses lie."""
        return self.builtin or self.path or (self.generated.uri if self.generated else "")

    @property
    def conversations(self) -> bool:
        """Whether records are conversations, or prompts of such, rather than running text."""
        return any((self.prompt_column, self.messages_column, self.generated))


@dataclass(frozen=True)
class TextInfo:
    """What is known of a text before it is used; `spec` holds what was found (see `TextSpec`)."""

    spec: TextSpec
    fingerprint: str
    num_rows: int | None
