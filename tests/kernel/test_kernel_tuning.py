"""The fastest tile runs: chosen with a clock that the test holds, remembered; untimed where nothing may be timed."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from orpo_kernels.gpu import tiles, tuning
from orpo_kernels.head import Head
from problems import relative_error

pytestmark = pytest.mark.kernels

TILES = (
    tiles.MatmulConfig(16, 32, 16, num_warps=1, num_stages=1),
    tiles.MatmulConfig(32, 16, 16, num_warps=1, num_stages=1, group_n=2),
)


class Clock:
    """Runs what is timed, and says that it took the next of the test's milliseconds."""

    def __init__(self, *milliseconds: float) -> None:
        self.left = list(milliseconds)

    def __call__(self, run, device) -> float:
        run()
        return self.left.pop(0)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A function: from now on the machine has a clock, and what is timed takes these milliseconds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "matmul_candidates", lambda *_, **__: TILES)
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    tuning.forget()

    def start(*milliseconds: float) -> Clock:
        found = Clock(*milliseconds)
        monkeypatch.setattr(tuning, "can_time", lambda device: True)
        monkeypatch.setattr(tuning, "milliseconds", found)
        return found

    yield start
    tuning.forget()


def _inputs(device, rows: int = 40, vocabulary: int = 70):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 24, generator=generator), torch.randn(vocabulary, 24, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return x.to(device), targets.to(device), Head(weight.to(device), softcap=20.0)


def _truth(x, targets, head):
    z = (x.double() @ head.weight_VD.double().T / head.softcap).tanh() * head.softcap
    return z, z.logsumexp(1), z.log_softmax(1).gather(1, targets[:, None])[:, 0]


def _logp(x, targets, head):
    from orpo_kernels.gpu.logit_stats import logit_stats
    from orpo_kernels.gpu.odds_ratio import combine

    return combine(*logit_stats(x, targets, head))[0]


@pytest.mark.parametrize("fast", [0, 1])
def test_the_fastest_tile_runs_from_then_on(fast, clock, monkeypatch, tmp_path, kernel_device):
    used = []
    monkeypatch.setattr(
        tiles.MatmulConfig,
        "launch_options",
        lambda self, original=tiles.MatmulConfig.launch_options: used.append(self) or original(self),
    )
    left = clock(*([1.0, 2.0] if fast == 0 else [2.0, 1.0])).left
    problem = _inputs(kernel_device)
    first = _logp(*problem)
    assert used == [*TILES, TILES[fast]] and left == []
    assert relative_error(first, _truth(*problem)[2]) < 1e-6
    # Again, and for other rows of the class: not timed, the same tile, the same bits.
    assert torch.equal(_logp(*problem), first)
    _logp(*_inputs(kernel_device, rows=50))
    assert used[3:] == [TILES[fast]] * 2
    # A later process reads the file.
    (file,) = (tmp_path / "cache" / "orpo_kernels").glob("*.json")
    assert json.loads(file.read_text())["chosen"] == str(TILES[fast])
    tuning.forget()
    assert torch.equal(_logp(*problem), first)
    # Another class is timed by itself.
    clock(1.0, 2.0)
    _logp(*_inputs(kernel_device, rows=70))
    assert used[-3:] == [*TILES, TILES[0]]


def test_tiles_that_are_no_longer_on_the_list_are_timed_again(clock, monkeypatch, kernel_device):
    clock(2.0, 1.0)
    problem = _inputs(kernel_device)
    _logp(*problem)
    tuning.forget()
    monkeypatch.setattr(tiles, "matmul_candidates", lambda *_, **__: TILES[::-1])
    left = clock(1.0, 2.0).left
    _logp(*problem)
    assert left == []


def test_gradients_under_a_clock(clock, monkeypatch, kernel_device):
    from orpo_kernels.gpu import logit_grad

    # Fewer rows are timed than there are.
    monkeypatch.setattr(logit_grad, "TIMED_ROWS", 8)
    left = clock(2.0, 1.0).left
    x, targets, head = _inputs(kernel_device)
    z, lse, logp = _truth(x, targets, head)
    g = logit_grad.logit_grad(x, targets, torch.stack([lse, lse * 0]).float(), -torch.expm1(logp).float(), None, head)
    one_hot = torch.nn.functional.one_hot(targets, z.shape[1])
    assert left == []
    assert relative_error(g, (one_hot - z.softmax(1)) * (1 - (z / head.softcap) ** 2)) < 1e-6


def test_a_tile_that_the_card_cannot_run_is_not_chosen(clock, caplog, monkeypatch, kernel_device):
    from triton.runtime.errors import OutOfResources

    clock()

    def milliseconds(run, device):
        if not caplog.messages:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 5.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    problem = _inputs(kernel_device)
    assert relative_error(_logp(*problem), _truth(*problem)[2]) < 1e-6
    assert list(tuning._chosen.values()) == [str(TILES[1])]
    assert f"{TILES[0]} does not fit this card" in caplog.text


def test_without_a_timing_the_first_tile_runs(clock, monkeypatch, kernel_device):
    problem = _inputs(kernel_device)
    clock()  # nothing may be timed: there is no time left to give
    torch.use_deterministic_algorithms(True)
    try:
        _logp(*problem)
    finally:
        torch.use_deterministic_algorithms(False)
    assert tuning._chosen == {}
    monkeypatch.setattr(tuning, "can_time", lambda device: False)
    _logp(*problem)
    assert tuning._chosen == {}
    monkeypatch.setattr(tuning, "can_time", lambda device: True)
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    captured = _logp(*problem)
    # After the capture the process keeps what the graph holds.
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    assert torch.equal(_logp(*problem), captured)
    assert list(tuning._chosen.values()) == [str(TILES[0])]


def test_an_evaluation_times_with_the_stores_that_training_makes(clock, monkeypatch, kernel_device):
    """Both have one class and one tile, whichever comes first, and the loss the same bits."""
    from orpo_kernels.gpu import logit_stats

    monkeypatch.setattr(tiles, "matmul_candidates", lambda *_, **__: [replace(tile, block_v=64) for tile in TILES])
    clock(2.0, 1.0)
    stores, original = [], logit_stats._logit_stats
    monkeypatch.setattr(
        logit_stats, "_logit_stats", lambda *args: stores.append(args[5] is not None) or original(*args)
    )
    logit_stats.logit_stats(*_inputs(kernel_device, vocabulary=130), columns=130)
    assert stores == [True, True, False] and len(tuning._chosen) == 1


OTHER_CLASS = b'{"class": "other", "chosen": "%s", "milliseconds": {}}' % str(TILES[0]).encode()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", OTHER_CLASS])
def test_a_corrupt_file_is_ignored_and_replaced(content, clock, caplog, tmp_path, kernel_device):
    clock(2.0, 1.0)
    problem = _inputs(kernel_device)
    _logp(*problem)
    (file,) = (tmp_path / "cache" / "orpo_kernels").glob("*.json")
    whole = file.read_bytes()
    file.write_bytes(content)
    tuning.forget()
    left = clock(2.0, 1.0).left
    _logp(*problem)
    assert left == [] and "is ignored" in caplog.text and file.read_bytes() == whole
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written(clock, caplog, tmp_path, kernel_device):
    (tmp_path / "cache").write_text("a file where the folder should be")
    left = clock(2.0, 1.0).left
    problem = _inputs(kernel_device)
    assert torch.equal(_logp(*problem), _logp(*problem))
    assert left == [] and "not remembered on disk" in caplog.text


def test_what_is_found_is_said_once(clock, caplog, kernel_device):
    clock(2.0, 1.0)
    with caplog.at_level(logging.INFO, "orpo_kernels.gpu.tuning"):
        _logp(*_inputs(kernel_device))
        _logp(*_inputs(kernel_device))
    (message,) = caplog.messages
    assert f": {TILES[1]}, timed: {TILES[0]} 2 ms" in message
