"""ResNet-152 over two devices, beside one: images/s, bubbles, and where both ranks' time goes.

    python benchmarks/pipeline.py --name cpu --batch 32 --image-size 96 --micro-batches 1,4,16 --threads 1
    python benchmarks/pipeline.py --name 2x-h200 --device cuda --dtype bfloat16 --batch 512 --batches 8 ...

What follows `--name` goes to `bireme pipeline --config resnet-152`. On GPUs of CUDA a rate is of the device's clock.
"""

from __future__ import annotations

import json
import subprocess
import sys

import command_line
import record
import torch


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--name", type=command_line.name, required=True)
    arguments, passed_on = parser.parse_known_args()
    command = [
        sys.executable, "-P", "-m", "bireme", "pipeline", "--config", "resnet-152", *passed_on, "--json",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    for one, staged in zip(found["one_device"], found["pipeline"], strict=True):
        print(
            f"{staged['micro_batches']:3} micro-batches: {one['images_per_s']:9.1f} images/s on one, "
            f"{staged['images_per_s']:9.1f} on two; bubble {100 * mean(staged['bubbles']):.1f} %, "
            f"of the schedule {100 * mean(staged['predicted_bubbles']):.1f} %"
        )
        for rank, shares in staged["ledger"].items():
            print(
                "   ", rank, {row: round(100 * share, 1) for row, share in shares.items() if share}
            )
    print(f"speed-up {found['speed_up']:.3f}, largest difference {found['largest_difference']:.1e}")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    record.write(
        f"resnet-152-{arguments.name}",
        ["bireme", "torch"],
        {"gpus": gpus, **found},
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
