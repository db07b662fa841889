"""How much hypothesis tries: `FUZZ_EXAMPLES` examples of each property."""

import os
import tempfile

import hypothesis
from hypothesis import HealthCheck, settings

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
hypothesis.configuration.set_hypothesis_home_dir(tempfile.mkdtemp())  # and not the folder that the tests run in
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")), deadline=None, database=None,
    suppress_health_check=CHECKS, print_blob=True,
)  # fmt: skip
