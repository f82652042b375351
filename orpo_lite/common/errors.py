"""What a user can mend."""


class RequestError(ValueError):
    """The request cannot be done as made: recipe, data, model or arguments.

    The message names the file, row or field, what was found, what was expected and what to do. Commands print it
    without a traceback and exit with status 2.
    """


class ToldElsewhere(RequestError):
    """An error of the request that another process of the run has told already."""
