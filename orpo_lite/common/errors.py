"""Errors that a user can fix."""


class RequestError(ValueError):
    """The request cannot be carried out as made: recipe, data, model or arguments.

    The message names the file, row or field, what was found, what was expected and what to do. Commands print it
    without a traceback and exit with status 2.
    """


class ReportedElsewhere(RequestError):
    """An error in the request that another process of the run has already reported."""
