"""The one exception for what the person at the keyboard can mend.

Contract: the message is ONE line that names the file, tensor or field and says what to do. The command
line prints it to stderr and exits with status 2, without a traceback. What cannot happen is an assert.

    python -c "from export.errors import UserError; raise UserError('config.json: ...')"
"""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: one line that names the thing and the mend."""

    def __init__(self, message: str) -> None:
        # Tensor names and JSON fields come from files: a line break inside one must not break the line.
        super().__init__(message.replace("\r", "\\r").replace("\n", "\\n"))
