"""What a message may hold: one line, no control characters, and none of the tokens in the environment."""

from __future__ import annotations

import logging
import os
import re

# Where this project's libraries look for a token.
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_TOKEN", "WANDB_API_KEY")
LONGEST = 600  # characters of a message
_SHORTEST = 8  # characters; what is shorter is no token, and would be found in ordinary words
# The hub's tokens by their look (they may come from a file), a user in an address, a header.
_LOOKS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^\s/@]+(?=@)|(?i:(?<=bearer )\S+)")


def holds_one(text: str) -> bool:
    """True if a token of the environment, or what looks like one of the hub, is in `text`."""
    return any(token in text for token in _tokens()) or bool(re.search(r"\bhf_\w{16,}", text))


def redacted(text: str) -> str:
    """`text` with `…` for every token."""
    for token in _tokens():
        text = text.replace(token, "…")
    return _LOOKS.sub("…", text)


def message(text: str) -> str:
    """`text` as one line that can be printed: no control characters, no tokens, cut to LONGEST."""
    # A token is looked for in the whole: cut first, half of one could be left.
    printable = "".join(c if c.isprintable() else " " for c in redacted(text[: 100 * LONGEST]))
    line = " ".join(printable.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


class Formatter(logging.Formatter):
    """Every log record without tokens; tracebacks, which hydra.verbose=true shows, too."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _tokens() -> list[str]:
    found = {os.environ.get(name, "").strip() for name in VARIABLES}
    return sorted((t for t in found if len(t) >= _SHORTEST), key=len, reverse=True)
