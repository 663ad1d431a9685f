"""Tools that the tests and .ci/run use."""
