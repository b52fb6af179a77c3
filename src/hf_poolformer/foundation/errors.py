"""The one exception for mistakes that the person at the keyboard can put right."""


class UserError(ValueError):
    """Something that was asked for cannot be done; the message says what is wrong and what to do about it.

    Scripts print the message as one line, `error: ...`, without a traceback, and exit with status 2.
    """


class Diverged(UserError):
    """The loss is no longer finite."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
