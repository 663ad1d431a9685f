"""The pytest side: how kernel tests choose where their kernels run.

    pytest --kernels=interpret    the Triton interpreter; numerics, races, bounds; needs nothing
    pytest --kernels=simt         the compiled kernels, executed on the CPU; needs llvmlite and gcc
    pytest --kernels=cuda         the compiled kernels on the GPU
    pytest                        cuda if there is one, else interpret

Tests that launch Triton kernels carry `@pytest.mark.kernels`; `@pytest.mark.kernels(modes=("simt",))` restricts a test
to some modes. With an explicit `--kernels=` a session in which no marked test ran fails: a mode that silently skips
everything is not a check. Marked tests get `torch.empty` and its relatives filled with NaN (integers: their largest
value), so that an output that a kernel forgot to write is seen.

Use from a conftest.py with `pytest_plugins = ["kernelcheck.plugin"]`. triton reads TRITON_INTERPRET when `@triton.jit`
decorates, so `configure` runs in `pytest_configure`, before any test module is imported.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

MODES = ("interpret", "simt", "cuda")

_mode: str | None = None
_explicit = False
_kernel_tests_run = 0


def configure(mode: str | None) -> str:
    """Prepare this process for kernels in `mode` (None: whatever the machine has) and return the mode.

    Raises `RuntimeError` in words where the mode cannot work here, and where it comes too late: a kernel that triton
    has already decorated keeps the mode it was decorated in.
    """
    global _mode
    import torch

    if mode is None:
        mode = "cuda" if torch.cuda.is_available() else "interpret"
    if mode not in MODES:
        raise ValueError(f"kernels mode must be one of {MODES}, got {mode!r}")
    if _mode is not None:
        if mode != _mode:
            raise RuntimeError(f"kernels of this process run with {_mode!r}: {mode!r} needs a process of its own")
        return mode
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted != (mode == "interpret") and "triton.language" in sys.modules and _decorated_kernels():
        raise RuntimeError(f"--kernels={mode} comes after kernels were decorated: {', '.join(_decorated_kernels())}")
    if mode == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--kernels=cuda, but torch.cuda.is_available() is False on this machine")
    if mode == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
        from . import interpreter

        interpreter.install()
        interpreter.install_driver()
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    if mode == "simt":
        from .simt import driver

        driver.install()
    _mode = mode
    return mode


def _decorated_kernels() -> list[str]:
    """Modules outside triton that hold kernels decorated already."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def holds_kernel(module: Any) -> bool:
        return any(isinstance(member, JITFunction | InterpretedFunction) for member in vars(module).values())

    return sorted(
        name
        for name, module in list(sys.modules.items())
        if not name.startswith(("triton.", "torch.")) and hasattr(module, "__dict__") and holds_kernel(module)
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", choices=MODES, default=None, help="where tests marked `kernels` run")


def pytest_configure(config: pytest.Config) -> None:
    global _explicit
    config.addinivalue_line("markers", "kernels(modes=None): launches Triton kernels; `modes`: only there")
    choice = config.getoption("--kernels")
    _explicit = choice is not None
    try:
        configure(choice)
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> str:
    return f"Triton kernels run with: {_mode}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("kernels")
        modes = marker.kwargs.get("modes") if marker else None
        if modes and _mode not in modes:
            item.add_marker(pytest.mark.skip(reason=f"checks --kernels={'|'.join(modes)}, this session runs {_mode}"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _kernel_tests_run
    if report.when == "call" and "kernels" in report.keywords and report.outcome != "skipped":
        _kernel_tests_run += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    runs_here = not (session.config.option.collectonly or hasattr(session.config, "workerinput"))
    if _explicit and runs_here and _kernel_tests_run == 0 and exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _explicit and _kernel_tests_run == 0 and not terminalreporter.config.option.collectonly:
        terminalreporter.write_line(f"FAILED: --kernels={_mode}, but no test marked `kernels` ran", red=True)


@pytest.fixture(autouse=True)
def _poison_kernel_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    from .memory import poisoned_empty

    with poisoned_empty() if request.node.get_closest_marker("kernels") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def kernel_mode() -> str:
    """How kernels run in this session: "interpret", "simt" or "cuda"."""
    assert _mode is not None
    return _mode


@pytest.fixture(scope="session")
def kernel_device(kernel_mode: str):
    """The torch device whose tensors the kernels of this session take."""
    import torch

    return torch.device("cuda" if kernel_mode == "cuda" else "cpu")
