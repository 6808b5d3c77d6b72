"""What a call, or a row of a batch, asks of a picture."""

from dataclasses import dataclass

from sana_cli.errors import UsageError

MOST_STEPS = 1000
LEAST_STRENGTH = 0.01
LONGEST_PROMPT = 20_000  # characters; 300 tokens are read of them
CHOICES = {
    "fit": ("trained", "exact"),
    "solver": ("flow-dpm", "flow-euler", "scm"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "text_precision": ("auto", "int8", "bf16", "fp32"),
}


@dataclass(frozen=True)
class Settings:
    """All but the seed; None leaves the choice to the model. UsageError for what no model takes."""

    prompt: str
    negative: str = ""
    model: str | None = None
    res: str | None = None
    ar: str | None = None
    fit: str = "trained"
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None
    image: str | None = None  # path of the picture to start from
    strength: float | None = None
    instruction: bool | None = None
    dtype: str = "auto"
    text_precision: str = "auto"

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UsageError("a prompt is empty", 'say what to draw: sana generate "a red fox"')
        check_text(self.prompt, "a prompt")
        check_text(self.negative, "--negative")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UsageError(f"{option(name)} {value!r} is not one of {', '.join(known)}")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UsageError(f"--steps {self.steps} is not between 1 and {MOST_STEPS}")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UsageError(f"--guidance {self.guidance} is not between 0 and 100")
        if self.strength is not None:
            if self.image is None:
                raise UsageError("--strength has no effect without --image", "add --image FILE")
            if not LEAST_STRENGTH <= self.strength <= 1:
                raise UsageError(
                    f"--strength {self.strength} is not between {LEAST_STRENGTH} and 1"
                )


def option(name: str) -> str:
    """`text_precision` -> `--text-precision`."""
    return f"--{name.replace('_', '-')}"


def check_text(text: str, what: str) -> None:
    """UsageError for text that no tokenizer, file name or image can hold."""
    if "\0" in text or len(text) > LONGEST_PROMPT:
        limit = f"is longer than {LONGEST_PROMPT} characters or holds a NUL"
        raise UsageError(f"{what} {limit}", "shorten it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not valid UTF-8 text") from None
