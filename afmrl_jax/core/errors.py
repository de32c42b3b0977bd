"""What a user got wrong, told in one sentence."""


class UserError(Exception):
    """A mistake that the user can mend; its message says what was found, where, and what to do.

    `main` prints it on standard error without a traceback and exits with status 2.
    """
