"""Property tests draw the same examples in every run, and may be slow on a busy machine."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "attnopt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attnopt")
