"""The checker that jaxtyping runs on all functions of vlm in the suite: see conftest.py."""

from beartype import BeartypeConf, beartype

# As PEP 484 has it, an int will do where a float is asked for.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """Check a function, but not the constructor of a config, which converts what it is given."""
    own = function.__module__.startswith("vlm.config.") and function.__qualname__.endswith(
        "__init__"
    )
    return function if own else _check(function)
