"""The one exception for what a user can put right: the command line tools print it as a single line."""


class InputError(ValueError):
    """An input that cannot be used; the message says what is wrong with it and what to do."""
