"""An adapter and its base model, saved as one model that needs no peft.

python -m orpo.merge ADAPTER_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import argparse

from orpo.cli.errors import run_command
from orpo.model.merging import merge_adapter as merge_adapter


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m orpo.merge", description=merge_adapter.__doc__.splitlines()[0])
    parser.add_argument("adapter")
    parser.add_argument("output")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run Python code that comes with the model.")
    args = parser.parse_args()
    merge_adapter(args.adapter, args.output, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    print(args.output)


if __name__ == "__main__":
    run_command("python -m orpo.merge", main)
