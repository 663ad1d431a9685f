"""axolotl's ORPO and SimPO, without the full logits, by a line of its configuration.

rl: orpo
plugins:
  - orpo.integrations.axolotl.FusedORPO
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from orpo.integrations import trl


class FusedORPO(BasePlugin):
    """axolotl's trainers for ``rl: orpo`` and ``rl: simpo`` are TRL's, which this plugin patches."""

    def pre_model_load(self, cfg: Any) -> None:
        """Called by axolotl before it loads the model.

        Raises:
            ValueError: ``rl`` is neither of the two.
            ImportError: axolotl's TRL is not known.
        """
        rl = getattr(cfg.rl, "value", cfg.rl)
        if rl not in ("orpo", "simpo"):
            raise ValueError(f"plugins: {__name__}.FusedORPO is for rl: orpo and rl: simpo, not rl: {rl}")
        trl.patch()
