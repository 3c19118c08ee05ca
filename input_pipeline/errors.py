"""Errors of other libraries, in the one line of ours."""


def first_line(error: Exception) -> str:
    """The first line of what an error says, at most 160 characters; its kind where it is silent."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
