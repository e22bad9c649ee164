"""Run as a program: training runs on simulated devices, or as one of several processes.

    python tests/mesh_runs.py DEVICES OUT KEY=VALUE...

Prints the losses of the run's updates, what share of the state each device holds, and which rows of a step were read.
It is a program because the number of devices is fixed when JAX starts.
"""

import json
import os
import sys
from typing import Any


def main() -> dict[str, Any]:
    devices, out, *settings = sys.argv[1:]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax
    import numpy as np

    import train
    from train import data
    from train.devices import Devices
    from train.loop import run

    values = {key: json.loads(value) for key, value in (s.split("=", 1) for s in settings)}
    read: list[int] = []
    shares: list[float] = []
    whole_read, whole_shardings = data.Dataset.batch, Devices.shardings

    def batch(self: Any, stream: str, **given: Any) -> np.ndarray:
        if given.get("step") == 0 and stream == "train":
            read.extend(map(int, given["chosen"]))
        return whole_read(self, stream, **given)

    data.Dataset.batch = batch
    config = train.TrainConfig.from_dict({"out_dir": out, "device": "cpu", **values})

    def shardings(self: Devices, config: Any, tree: Any) -> Any:
        places = whole_shardings(self, config, tree)
        sizes = [
            (np.prod(p.shard_shape(x.shape)), np.prod(x.shape))
            for p, x in zip(jax.tree.leaves(places), jax.tree.leaves(tree), strict=True)
        ]
        shares.append(float(sum(a for a, _ in sizes) / sum(b for _, b in sizes)))
        return places

    Devices.shardings = shardings
    result = run(config, progress=False)
    losses = [row["train_loss"] for row in result.rows() if "train_loss" in row]
    return {
        "losses": losses,
        "val_loss": result.losses.get("val_loss"),
        "share": shares[-1],
        "rows": sorted(read),
        "first": jax.process_index() == 0,
    }


if __name__ == "__main__":
    print(json.dumps(main()))
