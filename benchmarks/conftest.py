"""pytest's side of the suite: `--quick`, and a fixture that hands interleaved rounds to pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .measure import stamp


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny shapes: that everything runs, and every gate holds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    from .cases import CASES, HEADS, PROMPT_SHARES, head_case, real_case

    if metafunc.config.getoption("--quick"):
        cases = [CASES["tiny"], CASES["tiny padded"]]
    else:
        cases = [head_case(head, share) for head in HEADS for share in PROMPT_SHARES]
        cases += [real_case("SmolLM2-135M", pairs) for pairs in (2, 4, 8)]
    names = [f"{c.name}{'-padded' if c.lengths else ''}-{c.pairs}x{c.positions}-prompt{c.prompt}" for c in cases]
    metafunc.parametrize("case", cases, ids=names, scope="module")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """How often everything is timed."""
    return 2 if request.config.getoption("--quick") else 5


@pytest.fixture
def record(benchmark) -> Callable[[str, list[float], dict], None]:
    """Give pytest-benchmark rounds that were timed elsewhere, peers taking turns, which it cannot do by itself."""

    def give(group: str, seconds: list[float], figures: dict) -> None:
        benchmark.group = group
        # Without a mode it warns that nobody used it.
        benchmark._mode = "interleaved rounds"
        statistics = benchmark._make_stats(iterations=1)
        for value in seconds:
            statistics.update(value)
        benchmark.extra_info.update({**stamp(), **figures})

    return give
