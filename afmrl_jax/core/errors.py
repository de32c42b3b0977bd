"""What a user got wrong, told in one sentence."""


class UserError(Exception):
    """A mistake that the user can mend; its message says what was found, where, and what to do.

    `main` prints it on standard error without a traceback and exits with status 2.
    """


class TryAgain(UserError):
    """What may go better the next time, with nothing mended: `main` exits with status 75, at which
    launch/restart.sh starts the command again."""
