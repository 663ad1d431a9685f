"""Print the oldest packages that pyproject.toml allows for the trainer, as pip takes them: ``transformers==5.23``."""

import re
import tomllib
from pathlib import Path

# Those whose oldest version was measured; of the others any may come with them.
MEASURED = ("transformers", "datasets", "accelerate", "peft")

extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", r).groups() for r in extras["train"] + extras["peft"] if ">=" in r)
print(*(f"{name}=={floors[name]}" for name in MEASURED))
