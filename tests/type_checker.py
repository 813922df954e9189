"""The checker that jaxtyping runs on all functions of vlm in the suite: see conftest.py."""

from beartype import BeartypeConf, beartype

# As PEP 484 has it, an int will do where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
