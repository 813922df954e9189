"""The checker that jaxtyping runs on all functions of vlm in the suite: see conftest.py."""

import functools
import sys

from beartype import BeartypeConf, FrozenDict, beartype


def check(function):
    return _checker(hasattr(sys.modules.get("vlm.config.code"), "SourceCode"))(function)


@functools.cache
def _checker(has_codes: bool):
    """Accept any object where a config takes code, once the types of such fields are defined."""
    code = sys.modules.get("vlm.config.code")
    objects = dict.fromkeys((code.ImportPath, code.DataSource), object) if has_codes else {}
    # As PEP 484 has it, an int will do where a float is asked for.
    conf = BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict(objects))
    return beartype(conf=conf)
