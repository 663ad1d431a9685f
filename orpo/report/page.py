"""A run as one page to look at, ``report.html``: curves, held-out metrics, what became of the rows, answers."""

from __future__ import annotations

import base64
import json
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from orpo.files import write_whole
from orpo.report.card import describe_rows, describe_settings, held_out_metrics
from orpo.report.glossary import SYMBOLS, explained

PAGE = "report.html"
# Shown first: the metrics that docs/metrics.md says to watch.
FIRST = ("rewards/accuracies", "rewards/margins", "nll_loss")


def write_page(trainer: Any, folder: str | Path, *, described: str, samples: Path | None = None) -> Path:
    """Writes ``report.html`` to `folder`, which needs no other file and no network to be seen.

    Args:
        trainer: an :class:`orpo.ORPOTrainer` that has trained.
        folder: where ``curves.png`` lies, if there is one.
        described: one sentence that says what was trained on what.
        samples: the file of answers that ``generate_during_eval`` leaves; the first and the last of each prompt are
            shown.

    Returns:
        the path of the page.
    """
    folder = Path(folder)
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    head, settings = describe_settings(trainer, getattr(unwrapped, "peft_config", {}))
    latest, best = held_out_metrics(trainer)
    metrics = [
        {"name": name, "first": _first(trainer.state.log_history, name), "last": value, **_words(name)}
        for name, (value, _) in sorted(latest.items(), key=lambda item: _rank(item[0]))
        if name != "epoch"
    ]
    picture = folder / "curves.png"
    page = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=folder.absolute().name,
            described=described,
            metrics=metrics,
            best=best,
            step=max((step for _, step in latest.values()), default=0),
            symbols=SYMBOLS,
            curves=base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else "",
            data=describe_rows(trainer),
            settings_head=head,
            beta=trainer.args.beta,
            nll_weight=trainer.args.nll_weight,
            preset=trainer.args.preset,
            settings={name: v if isinstance(v, str | int | float) else json.dumps(v) for name, v in settings.items()},
            samples=read_samples(samples) if samples is not None and samples.is_file() else [],
            command=f"orpo-generate {shlex.quote(str(folder))} --prompt 'How do I boil an egg?'",
        )
    )
    write_whole(folder / PAGE, page)
    return folder / PAGE


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The first and the last answer to each prompt in the file that ``generate_during_eval`` leaves."""
    rows: dict[tuple[str | None, str, str], dict[str, Any]] = {}
    for line in path.read_text("utf-8").split("\n"):
        if not line:
            continue
        seen = json.loads(line)
        row = rows.setdefault(
            (seen.get("dataset"), seen["prompt"], seen["chosen"]),
            {"prompt": seen["prompt"], "chosen": seen["chosen"], "before": seen["answer"], "before_step": seen["step"]},
        )
        row |= {"after": seen["answer"], "after_step": seen["step"]}
    return list(rows.values())


def _rank(name: str) -> tuple[int, str]:
    return next((i for i, metric in enumerate(FIRST) if name.endswith(metric)), len(FIRST)), name


def _first(history: list[dict[str, Any]], name: str) -> str:
    value = next((entry[f"eval_{name}"] for entry in history if f"eval_{name}" in entry), "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(name: str) -> dict[str, str]:
    what, goes = explained(name)
    return {"what": what, "goes": goes}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("orpo.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = _code
    return environment


def _code(text: str) -> Markup:
    """`text` as HTML, with code where it has backticks."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))
