"""The one exception that people see."""


class MinisbError(Exception):
    """One clear sentence about something the user can mend.

    The scripts print it on stderr and exit with code 2, never with a traceback.
    """
