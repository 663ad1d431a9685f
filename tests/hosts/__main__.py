"""Installs this package beside another project's training program, and trains with and without it.

    python -m tests.hosts axolotl
    python -m tests.hosts trl llamafactory --folder envs        environments are kept, and used again

For each host: an environment with its own pins and a CPU build of torch; `pip install .` here, which may add packages
and change none; three steps of the host's own ORPO on a tiny model without and with this package, whose logged figures
have to agree to 1e-5. Prints the host's row of the table in docs/installing.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Host:
    """What is installed, in order; those in `alone` without what they ask for, of which a CPU has not all."""

    name: str
    packages: str
    alone: str = ""


TORCH = "torch==2.13.0"
HOSTS = {
    "trl": Host("trl", "trl==1.16.0"),
    "axolotl": Host(
        "axolotl",
        "transformers==5.16.1 trl==1.9.0 datasets==4.8.4 accelerate==1.13.0 peft==0.20.0 tokenizers==0.23.1 "
        "pydantic==2.12.5 packaging==26.0 mistral-common==1.11.5 evaluate==0.4.1 python-dotenv==1.0.1 typer==0.25.1 "
        "schedulefree==1.4.1 zstandard==0.22.0 axolotl-contribs-mit==0.0.6 addict art colorama einops fire fastcore "
        "hf_transfer immutabledict langdetect numba nvidia-ml-py posthog psutil requests scipy sentencepiece "
        "tensorboard tomlkit wandb",
        "axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 optimum==1.16.2 bitsandbytes==0.50.2 torchao==0.17.0 "
        "liger-kernel==0.8.1 kernels<0.17 kernels-data",
    ),
    "llamafactory": Host(
        "llamafactory",
        "transformers==5.6.0 trl==0.24.0 datasets==4.0.0 accelerate==1.11.0 peft==0.18.1 gradio<=5.50.0 av<=16.0.0 "
        "tyro<0.9.0 einops fastapi fire hf-transfer librosa matplotlib modelscope omegaconf pandas pillow protobuf "
        "psutil pydantic pyyaml scipy sentencepiece soundfile sse-starlette tiktoken uvicorn",
        "llamafactory==0.9.5 torchdata<=0.11.0",
    ),
    "ms-swift": Host("ms-swift", "ms-swift==4.6.0 transformers==5.17.0 trl==0.29.1 datasets==4.8.4 peft==0.20.0"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hosts", nargs="+", choices=HOSTS, metavar="host", help=", ".join(HOSTS))
    parser.add_argument("--folder", type=Path, help="of the environments; default: one that is deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.hosts:
            print(try_host(HOSTS[name], (options.folder or Path(temporary)).absolute() / name))


def try_host(host: Host, folder: Path) -> str:
    """The host's row of the table."""
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder)])
        for packages in ([TORCH], host.packages.split()):
            run([*pip, "install", "--quiet", *packages])
        if host.alone:
            run([*pip, "install", "--quiet", "--no-deps", *host.alone.split()])
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "fused-orpo"], check=True)
    before, complaints = versions(pip), check(pip)
    run([*pip, "install", "--quiet", str(ROOT)])
    after = versions(pip)
    changed = {package for package, version in before.items() if after.get(package) != version}
    added = after.keys() - before.keys()
    if changed or not added <= {"fused-orpo", "triton"}:
        raise SystemExit(f"{host.name}: pip install changed {sorted(changed)} and added {sorted(added)}")
    # Triton may settle some of them.
    if new := check(pip) - complaints:
        raise SystemExit(f"{host.name}: pip check complains of {sorted(new)}")
    with tempfile.TemporaryDirectory() as work:
        steps = [three_steps(host, python, Path(work) / mode, mode) for mode in ("plain", "fused")]
    difference = largest_difference(*steps)
    if difference > TOLERANCE:
        raise SystemExit(f"{host.name}: figures of three steps differ by {difference:.1e}, which is above {TOLERANCE}")
    columns = after[host.name], after["torch"], after["transformers"], after["trl"]
    return f"| {host.name} " + "".join(f"| {column} " for column in columns) + f"| none | {difference:.1e} |"


def three_steps(host: Host, python: Path, folder: Path, mode: str) -> list[dict[str, float]]:
    """What the host logged."""
    folder.mkdir()
    script = Path(__file__).parent / f"run_{host.name.replace('-', '_')}.py"
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [str(python), str(script), str(folder), mode],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{host.name}, {mode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((folder / "steps.json").read_text())


def largest_difference(plain: list[dict[str, float]], fused: list[dict[str, float]]) -> float:
    """Of two runs that logged the same names."""
    if len(plain) != 3 or [step.keys() for step in plain] != [step.keys() for step in fused]:
        raise SystemExit(f"the two runs logged different things: {plain} and {fused}")
    return max(abs(step[name] - other[name]) for step, other in zip(plain, fused, strict=True) for name in step)


def versions(pip: list[str]) -> dict[str, str]:
    """Of every package that is installed."""
    listing = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
    return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(listing)}


def check(pip: list[str]) -> set[str]:
    """What `pip check` complains of."""
    return set(subprocess.run([*pip, "check"], capture_output=True, text=True).stdout.splitlines())


def run(command: list[str]) -> None:
    """Runs `command`; ends with its output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()
