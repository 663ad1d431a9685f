"""report_to by name, offline: metrics and samples arrive in each tracker that is installed."""

import importlib.util
import uuid

import pytest
from tiny import SEVEN
from trainers import make_args, make_trainer

from orpo.trainer.config import TRACKERS

SAMPLED = {"eval_dataset": SEVEN, "generate_during_eval": True, "eval_max_new_tokens": 4, "eval_samples": 2}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def tracked(tmp_path, name, project="trials"):
    trainer = make_trainer(tmp_path / "out", report_to=name, run_name="trial", project=project, **SAMPLED, **EVERY_STEP)
    trainer.train()
    return trainer


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = tracked(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/log_odds_ratio", "eval/loss", "eval/rewards/accuracies"} <= set(tags["scalars"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    (tag,) = [tag for tag in tags["tensors"] if tag.startswith("samples")]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    assert len(texts) == 2 and all("| hi nice to meet you |" in text for text in texts)


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        trainer = tracked(tmp_path, "wandb")
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert summary["eval/loss"] == pytest.approx(loss)
    assert summary["samples"]["_type"] == "table-file" and summary["samples"]["nrows"] == 2
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/samples*"))


def test_trackio_local(tmp_path):
    pytest.importorskip("trackio", reason="needs pip install trackio")
    # TRACKIO_DIR is read when trackio is imported, which may have been before: runs of the same name would add up.
    project = f"trials-{uuid.uuid4().hex}"
    trainer = tracked(tmp_path, "trackio", project)
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs(project, "trial")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == pytest.approx([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    tables = [row["samples"] for row in rows if "samples" in row]
    assert len(tables) == 2


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find_spec(n, *a))
    with pytest.raises(ImportError, match=f"report_to {name} needs {name}.*pip install {name}"):
        make_args(tmp_path, report_to=[name])
