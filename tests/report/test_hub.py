"""A wrong name is told at once, and what could still be had is not refused."""

from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import constants
from tiny import SEVEN, make_model, make_tokenizer
from trainers import make_args

from orpo import ORPOTrainer, hub
from orpo.data.files.sources import load_pairs
from orpo.model.load import load_model, load_tokenizer


class ConnectError(Exception):
    pass


class ReadTimeout(Exception):
    pass


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A hub that cannot be reached, with an empty cache; the list of requests to it."""
    requests = []

    def head(url, timeout):
        requests.append(url)
        raise ConnectError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return requests


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_pairs])
def test_no_folder_and_no_hub(load, asked):
    with pytest.raises(ValueError, match=r"there is no folder nothere, and the hub cannot be reached \(no route\)"):
        load("nothere")
    assert asked == [constants.ENDPOINT]


def test_what_lies_here_is_not_asked_for(asked, tmp_path):
    for folder in ("model", "hub/models--someone--base", "hub/datasets--someone--pairs", "datasets/someone___my_set"):
        (tmp_path / folder).mkdir(parents=True)
    for name, kind in (
        ("model", "model"),
        ("someone/base", "model"),
        ("someone/pairs", "dataset"),
        ("someone/MySet", "dataset"),
    ):
        hub.check_hub_name(name, kind)
    assert not asked
    with pytest.raises(ValueError, match="no folder someone/pairs"):
        hub.check_hub_name("someone/pairs")
    (tmp_path / "elsewhere" / "models--someone--pairs").mkdir(parents=True)
    hub.check_hub_name("someone/pairs", cache_dir=tmp_path / "elsewhere")


def test_offline_nothing_is_asked(asked, monkeypatch):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    with pytest.raises(ValueError, match="no folder nothere, and HF_HUB_OFFLINE keeps from asking the hub for a model"):
        hub.check_hub_name("nothere")
    with pytest.raises(ValueError, match="no folder runs/of/mine, and no name on the hub has two slashes"):
        hub.check_hub_name("runs/of/mine")
    assert not asked


def test_any_other_failure_is_the_hubs_to_tell(asked, monkeypatch):
    def head(url, timeout):
        raise ReadTimeout

    for answer in (head, lambda url, timeout: SimpleNamespace(status_code=503)):
        monkeypatch.setattr(hub, "get_session", lambda answer=answer: SimpleNamespace(head=answer))
        hub.check_hub_name("someone/base")


def test_the_folder_of_the_hubs_files_is_asked_for_configuration_and_tokenizer_too(tmp_path, monkeypatch):
    """Offline, a model that lies in cache_dir alone loads whole: it was refused before its weights were read."""
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("0" * 40)
    (tmp_path / "hub" / "models--someone--tiny" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "models--someone--tiny" / "refs" / "main").write_text("0" * 40)
    make_model("llama").save_pretrained(snapshot)
    make_tokenizer().save_pretrained(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    args = make_args(tmp_path / "out", model_init_kwargs={"cache_dir": str(tmp_path / "hub")})
    trainer = ORPOTrainer("someone/tiny", args, train_dataset=SEVEN)
    assert trainer.processing_class.get_vocab() == make_tokenizer().get_vocab()
