"""Requests that schemathesis makes of the OpenAPI document, against a real server.

    python tests/fuzz/openapi.py --examples 2000

Each operation gets requests that fit its description and requests that do not. None may be
answered by a 5xx, by a status or a body that the document does not name, or not at all; what does
not fit must be refused.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serving")]

SECONDS = 20


def conform(url: str, examples: int) -> dict[str, int]:
    """The number of requests made of each operation; the first that is answered wrongly raises."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    operations = [found.ok() for found in schema.get_all_operations()]
    return {
        operation.label: sum(requests(operation, mode, examples) for mode in modes)
        for operation in operations
    }


def requests(operation, mode, examples: int) -> int:
    """Make requests of one operation that fit its description, or that do not, and count them."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
        checks.unsupported_method,
    ]
    made = 0

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case):
        nonlocal made
        made += 1
        case.call_and_validate(checks=wanted, timeout=SECONDS)

    with contextlib.suppress(Unsatisfiable):  # nothing is wrong for a request without parameters
        one()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500)
    args = parser.parse_args()

    from serving import running, saved_index, small_bundle

    bundle = small_bundle()
    with tempfile.TemporaryDirectory() as folder:
        index = saved_index(bundle, pathlib.Path(folder), {"year": range(8)})
        with running(bundle, index=index) as server:
            counts = conform(server.url, args.examples)
    for label, count in counts.items():
        print(f"{label}: {count:,} requests, all answered as described")


if __name__ == "__main__":
    main()
