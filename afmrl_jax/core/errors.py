"""Errors that a user can understand from one sentence."""


class UserError(Exception):
    """A mistake that the user can mend. Its message names the mistake, its place and the remedy.

    `main` prints it on standard error without a traceback and exits with status 2.
    """


class TryAgain(UserError):
    """A failure that may not happen again, with nothing mended.

    `main` exits with status 75, on which launch/restart.sh starts the command again.
    """
